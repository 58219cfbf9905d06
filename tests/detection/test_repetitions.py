from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.detection import Detections, tiou
from re2tal.detection.segments import without_repetitions

Row = tuple[float, float, float, int, bool]


def slow(rows: list[Row], iou: float) -> list[int]:
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
                and tiou(torch.tensor(rows[i][:2]), torch.tensor(rows[best][:2])) >= iou
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
def test_equals_one_detection_at_a_time(rows: list[Row], iou: float) -> None:
    table = torch.tensor([row[:3] for row in rows]).reshape(-1, 3)
    found = Detections(
        segments=table[:, :2],
        scores=table[:, 2],
        labels=torch.tensor([row[3] for row in rows], dtype=torch.int64),
    )
    second = torch.tensor([row[4] for row in rows], dtype=torch.bool)
    expected = torch.tensor(slow(rows, iou), dtype=torch.int64)
    left = without_repetitions(found, second, iou=iou)
    assert torch.equal(left.segments, found.segments[expected])
    assert torch.equal(left.scores, found.scores[expected])
    assert torch.equal(left.labels, found.labels[expected])
