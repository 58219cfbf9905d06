from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from re2tal.localizers import Targets
from re2tal.localizers.actionformer import assign, make_points

RANGES = ((0.0, 4.0), (4.0, 8.0), (8.0, math.inf))
Instance = tuple[float, float, int]


def targets_of(instances: list[Instance]) -> Targets:
    return Targets(
        segments=torch.tensor([i[:2] for i in instances]).reshape(-1, 2).float(),
        labels=torch.tensor([i[2] for i in instances], dtype=torch.int64),
    )


def slow_assign(
    instances: list[Instance],
    time: float,
    stride: float,
    bounds: tuple[float, float],
    shortest_only: bool,
) -> tuple[list[float], list[float] | None]:
    """Classes and offsets of one point."""
    fits = []
    for start, end, label in instances:
        centre = (start + end) / 2
        inside = start < time < end and abs(time - centre) < 1.5 * stride
        if inside and bounds[0] <= max(time - start, end - time) <= bounds[1]:
            fits.append((end - start, start, end, label))
    classes = [0.0, 0.0, 0.0]
    if not fits:
        return classes, None
    shortest = min(fit[0] for fit in fits)
    for fit in fits:
        if fit[0] <= shortest + 1e-3 or not shortest_only:
            classes[fit[3]] = 1.0
    _, start, end, _ = next(fit for fit in fits if fit[0] == shortest)
    return classes, [(time - start) / stride, (end - time) / stride]


# Quarters are exact in float32, and make points on boundaries and equal lengths common.
instance = st.tuples(st.integers(-8, 64), st.integers(0, 72), st.integers(0, 2)).map(
    lambda t: (t[0] / 4, (t[0] + t[1]) / 4, t[2])
)


@settings(deadline=None)
@given(st.lists(st.lists(instance, max_size=4), min_size=1, max_size=3), st.booleans())
def test_equals_one_point_at_a_time(samples: list[list[Instance]], shortest_only: bool) -> None:
    points = make_points(16, RANGES, torch.device("cpu"))
    targets = [targets_of(s) for s in samples]
    actual = assign(points, targets, 3, radius=1.5, shortest_only=shortest_only)
    for b, instances in enumerate(samples):
        position = 0
        for level, bounds in enumerate(RANGES):
            for step in range(16 >> level):
                classes, offsets = slow_assign(
                    instances, step * 2.0**level, 2.0**level, bounds, shortest_only
                )
                assert actual.classes[b, position].tolist() == classes
                if offsets is not None:
                    assert actual.offsets[b, position].tolist() == offsets
                position += 1
        assert position == actual.classes.shape[1]


def test_points_lie_where_the_strided_convolutions_put_them() -> None:
    points = make_points(8, RANGES, torch.device("cpu"))
    assert points.times.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 4, 6, 0, 4]
    assert points.strides.tolist() == [1] * 8 + [2] * 4 + [4] * 2
    assert points.lengths == (8, 4, 2)
    assert points.ranges[8].tolist() == [4, 8]


def test_a_class_that_the_localizer_lacks_is_refused() -> None:
    points = make_points(8, RANGES, torch.device("cpu"))
    for label in (3, -1):
        with pytest.raises(ValueError, match=f"label {label}"):
            assign(points, [targets_of([(1, 2, label)])], 3, radius=1.5)
    labels: Tensor = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="Targets need"):
        Targets(segments=torch.zeros(3, 2), labels=labels)
