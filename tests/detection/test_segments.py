from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.detection import Detections, tiou


def make(scores: list[float]) -> Detections:
    count = len(scores)
    starts = torch.arange(float(count))
    return Detections(
        segments=torch.stack([starts, starts + 1], dim=1),
        scores=torch.tensor(scores),
        labels=torch.arange(count),
    )


def slow_tiou(a: tuple[float, float], b: tuple[float, float]) -> float:
    length_a, length_b = max(a[1] - a[0], 0.0), max(b[1] - b[0], 0.0)
    if length_a == 0 and length_b == 0:
        return float(a[0] == b[0])
    if length_a == 0 or length_b == 0:
        return 0.0
    shared = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    return shared / (length_a + length_b - shared)


segment = st.tuples(st.integers(-4, 8), st.integers(-4, 8)).map(
    lambda pair: (pair[0] / 2, pair[1] / 2)
)


@settings(deadline=None)
@given(segment, segment)
def test_tiou_is_the_ratio_of_lengths(a: tuple[float, float], b: tuple[float, float]) -> None:
    overlap = tiou(torch.tensor(a), torch.tensor(b))
    assert overlap.item() == pytest.approx(slow_tiou(a, b))
    assert torch.equal(overlap, tiou(torch.tensor(b), torch.tensor(a)))


def test_tiou_broadcasts_to_all_pairs() -> None:
    a, b = torch.rand(5, 2).sort(dim=1).values, torch.rand(3, 2).sort(dim=1).values
    pairs = tiou(a[:, None], b[None])
    assert pairs.shape == (5, 3)
    assert pairs[4, 1].item() == pytest.approx(
        slow_tiou(tuple(a[4].tolist()), tuple(b[1].tolist()))
    )


def test_sorting_keeps_the_order_of_equal_scores() -> None:
    assert make([0.5, 0.9, 0.5, 0.9]).sorted().labels.tolist() == [1, 3, 0, 2]


def test_concat_keeps_everything_in_order() -> None:
    both = Detections.concat([make([0.1, 0.2]), Detections.empty(), make([0.3])])
    assert both.scores.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert both.labels.tolist() == [0, 1, 0]
    assert both.labels.dtype == torch.int64
    assert len(Detections.concat([])) == 0


def test_indexing_and_new_segments_keep_scores_and_labels_together() -> None:
    some = make([0.1, 0.2, 0.3])[torch.tensor([True, False, True])]
    assert some.labels.tolist() == [0, 2]
    moved = some.with_segments(some.segments + 10)
    assert moved.segments[:, 0].tolist() == [10, 12]
    assert moved.scores is some.scores


@pytest.mark.parametrize(
    ("segments", "scores", "labels"),
    [((3, 2), (2,), (2,)), ((2, 3), (2,), (2,)), ((2, 2), (2, 1), (2,))],
)
def test_shapes_that_disagree_are_refused(
    segments: tuple[int, ...], scores: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="Detections need segments"):
        Detections(
            segments=torch.zeros(segments), scores=torch.zeros(scores), labels=torch.zeros(labels)
        )
