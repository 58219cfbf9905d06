from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.detection import Detections, tiou
from re2tal.detection.segments import without_repetitions
from tests.detection.rows import detections, overlap, same


def make(scores: list[float]) -> Detections:
    count = len(scores)
    starts = torch.arange(float(count))
    return Detections(
        segments=torch.stack([starts, starts + 1], dim=1),
        scores=torch.tensor(scores),
        labels=torch.arange(count),
    )


segment = st.tuples(st.integers(-4, 8), st.integers(-4, 8)).map(
    lambda pair: (pair[0] / 2, pair[1] / 2)
)


@settings(deadline=None)
@given(segment, segment)
def test_tiou_is_the_ratio_of_lengths(a: tuple[float, float], b: tuple[float, float]) -> None:
    found = tiou(torch.tensor(a), torch.tensor(b))
    assert found.item() == pytest.approx(overlap(a, b))
    assert torch.equal(found, tiou(torch.tensor(b), torch.tensor(a)))


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


# Repetitions

Twofold = tuple[float, float, float, int, bool]


def without_slowly(rows: list[Twofold], iou: float) -> list[int]:
    """One detection at a time."""
    waiting, kept = list(range(len(rows))), []
    while waiting:
        best = max(waiting, key=lambda i: (rows[i][2], -i))
        kept.append(best)
        waiting = [
            i
            for i in waiting
            if i != best
            and not (
                rows[i][3] == rows[best][3]
                and rows[i][4] != rows[best][4]
                and overlap(rows[i], rows[best]) >= iou
            )
        ]
    return sorted(kept)


rows = st.lists(
    st.tuples(
        st.integers(0, 8), st.integers(1, 6), st.integers(0, 4), st.integers(0, 1), st.booleans()
    ).map(lambda r: (float(r[0]), float(r[0] + r[1]), r[2] / 4, r[3], r[4])),
    max_size=12,
)


@settings(deadline=None)
@given(rows, st.sampled_from([0.2, 0.5, 1.0]))
def test_repetitions_are_those_of_one_detection_at_a_time(rows: list[Twofold], iou: float) -> None:
    found = detections([row[:4] for row in rows])
    second = torch.tensor([row[4] for row in rows], dtype=torch.bool)
    expected = torch.tensor(without_slowly(rows, iou), dtype=torch.int64)
    assert same(without_repetitions(found, second, iou=iou), found[expected])
