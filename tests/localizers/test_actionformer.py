"""ActionFormer: points and their assignment, decoding, and sizes of published models."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.localizers import ActionFormerConfig, Targets
from re2tal.localizers.points import assign, make_points
from tests.localizers.small import ACTIONFORMER, built, same, sample

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


def test_padded_points_detect_nothing() -> None:
    features, mask = sample([32, 9])
    logits, _, valid, points = built(ACTIONFORMER).predict(features, mask)
    assert valid[1].tolist() == [time < 9 for time in points.times.tolist()]
    found = built(replace(ACTIONFORMER, score_threshold=0.0, min_duration=-1.0))(features, mask)
    assert len(found[0]) == logits.shape[1] * 4
    assert len(found[1]) == int(valid[1].sum()) * 4


def test_each_level_passes_on_its_best() -> None:
    features, mask = sample([32, 32])
    every = built(replace(ACTIONFORMER, score_threshold=0.0, min_duration=-1.0))(features, mask)[0]
    some = built(replace(ACTIONFORMER, score_threshold=0.0, min_duration=-1.0, top_k=5))
    best = some(features, mask)[0]
    for level, (first, count) in enumerate([(0, 128), (128, 64), (192, 32)]):
        expected = every.scores[first : first + count].sort(descending=True).values[:5]
        assert torch.equal(best.scores[5 * level : 5 * level + 5], expected)
    middle = float(every.scores.median())
    lengths = every.segments[:, 1] - every.segments[:, 0]
    usual = float(lengths.median())
    few = built(replace(ACTIONFORMER, score_threshold=middle, min_duration=usual))(features, mask)[
        0
    ]
    expected_count = ((every.scores > middle) & (lengths > usual)).sum()
    assert 0 < len(few) == expected_count < len(every)


def test_drop_path_is_for_training_and_follows_the_seed() -> None:
    model = built(replace(ACTIONFORMER, drop_path=0.5))
    features, mask = sample([32, 32])
    assert same(model(features, mask)[0], model(features, mask)[0])
    model.train()
    torch.manual_seed(3)
    first = model(features, mask)[0]
    assert not same(first, model(features, mask)[0])
    torch.manual_seed(3)
    assert same(first, model(features, mask)[0])


def test_scores_start_at_the_prior() -> None:
    features, mask = sample([32, 32])
    torch.manual_seed(0)
    logits, *_ = (
        replace(ACTIONFORMER, empty_classes=(2,)).build(6, 4).eval().predict(features, mask)
    )
    scores = logits.sigmoid().mean(dim=(0, 1))
    assert all(0.003 < scores[label] < 0.03 for label in (0, 1, 3))
    assert scores[2] < 1e-5


def test_published_configurations_have_the_published_number_of_parameters() -> None:
    """Counted once in the public implementation, with the files that it publishes."""
    thumos = ActionFormerConfig()
    anet = replace(thumos, width=256, head_width=256, window=(7, 7, 7, 7, 7, 0), positions=192)
    epic = replace(thumos, window=9, overlapping_ranges=True)
    ego4d = replace(epic, levels=8, positions=1024, dropout=0.1)
    three = ((2304, 256), (1536, 384), (256, 384))
    joined = replace(ego4d, width=1024, streams=three, heads=16, head_width=1024)
    for config, channels, classes, expected in (
        (thumos, 2048, 20, 29_251_612),
        (anet, 512, 1, 6_943_497),
        (epic, 2304, 97, 29_763_177),
        (epic, 2304, 300, 30_075_188),
        (ego4d, 1536, 110, 34_927_736),
        (joined, 4096, 110, 134_048_888),
    ):
        with torch.device("meta"):
            model = config.build(channels, classes)
        assert sum(p.numel() for p in model.parameters()) == expected
    assert [most for _, most in thumos.ranges] == [4, 8, 16, 32, 64, math.inf]
    assert [least for least, _ in thumos.ranges] == [0, 4, 8, 16, 32, 64]
    assert [least for least, _ in epic.ranges] == [0, 2, 4, 8, 16, 32]
