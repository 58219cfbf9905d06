"""Detections from rows of numbers, and their overlaps one pair at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from re2tal.detection import Detections

Row = tuple[float, float, float, int]  # start, end, score, label
Videos = dict[str, list[Row]]


def detections(rows: Sequence[Row], dtype: torch.dtype = torch.float64) -> Detections:
    table = torch.tensor([row[:3] for row in rows], dtype=dtype).reshape(-1, 3)
    labels = torch.tensor([row[3] for row in rows], dtype=torch.int64)
    return Detections(segments=table[:, :2], scores=table[:, 2], labels=labels)


def by_video(videos: Mapping[str, Sequence[Row]]) -> dict[str, Detections]:
    return {video: detections(rows) for video, rows in videos.items()}


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Temporal IoU of two rows; reversed segments are instants, and equal instants overlap."""
    length_a, length_b = max(a[1] - a[0], 0.0), max(b[1] - b[0], 0.0)
    if length_a == 0 or length_b == 0:
        return float(length_a == length_b and a[0] == b[0])
    shared = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    return shared / (length_a + length_b - shared)


def same(a: Detections, b: Detections) -> bool:
    """Equality to the bit and of the precision."""
    pairs = ((a.segments, b.segments), (a.scores, b.scores), (a.labels, b.labels))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
