"""Scored segments, and the overlap of two segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class LabelledSegments(Protocol):
    """Segments `(N, 2)` with labels `(N,)`: ground truth or detections."""

    @property
    def segments(self) -> Tensor:
        """Starts and ends, `(N, 2)`."""
        ...

    @property
    def labels(self) -> Tensor:
        """Class indices, `(N,)` int64."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Detections:
    """Scored, labelled segments of one video or of one window of it.

    Segments are in feature-grid units inside a localizer, and in seconds everywhere else.

    Attributes:
        segments: `(N, 2)` floating point, `[start, end]`.
        scores: `(N,)` floating point.
        labels: `(N,)` int64 class indices.
    """

    segments: Tensor
    scores: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        count = self.scores.shape[0] if self.scores.ndim == 1 else -1
        if self.segments.shape != (count, 2) or self.labels.shape != (count,):
            raise ValueError(
                f"Detections need segments (N, 2), scores (N,) and labels (N,), but got "
                f"{tuple(self.segments.shape)}, {tuple(self.scores.shape)} and "
                f"{tuple(self.labels.shape)}."
            )

    def __len__(self) -> int:
        return self.scores.shape[0]

    @staticmethod
    def empty(device: torch.device | str = "cpu") -> Detections:
        """Return zero detections, in float32."""
        return Detections(
            segments=torch.zeros(0, 2, device=device),
            scores=torch.zeros(0, device=device),
            labels=torch.zeros(0, dtype=torch.int64, device=device),
        )

    @staticmethod
    def concat(parts: Sequence[Detections]) -> Detections:
        """Concatenate the detections of all `parts` in their order; without parts, return none."""
        if not parts:
            return Detections.empty()
        return Detections(
            segments=torch.cat([part.segments for part in parts]),
            scores=torch.cat([part.scores for part in parts]),
            labels=torch.cat([part.labels for part in parts]),
        )

    def __getitem__(self, index: Tensor | slice) -> Detections:
        """Select detections by an index tensor `(M,)`, a mask `(N,)` or a slice."""
        return Detections(
            segments=self.segments[index], scores=self.scores[index], labels=self.labels[index]
        )

    def with_segments(self, segments: Tensor) -> Detections:
        """Replace the segments by `segments` `(N, 2)`; scores and labels stay."""
        return replace(self, segments=segments)

    def sorted(self) -> Detections:
        """Sort by falling score; equal scores keep their order."""
        return self[self.scores.argsort(descending=True, stable=True)]

    def to(self, device: torch.device | str) -> Detections:
        """Copy to `device`; tensors that are there already are not copied."""
        return Detections(
            segments=self.segments.to(device),
            scores=self.scores.to(device),
            labels=self.labels.to(device),
        )


def tiou(a: Tensor, b: Tensor) -> Tensor:
    """Temporal intersection over union of segments, broadcasting over leading dimensions.

    Two instants (segments of zero length) have tIoU 1 if they coincide, otherwise 0. An instant and
    a longer segment have tIoU 0. Reversed segments count as instants at their start.

    Args:
        a: `(..., 2)` floating point segments.
        b: `(..., 2)` segments in the same unit, broadcastable to `a`. For all pairs of `(N, 2)`
            and `(M, 2)` give `a[:, None]` and `b[None]`.

    Returns:
        The overlaps in [0, 1], of the broadcast leading shape.
    """
    start_a, end_a = a[..., 0], a[..., 1]
    start_b, end_b = b[..., 0], b[..., 1]
    length_a = (end_a - start_a).clamp(min=0)
    length_b = (end_b - start_b).clamp(min=0)
    shared = (torch.minimum(end_a, end_b) - torch.maximum(start_a, start_b)).clamp(min=0)
    # Reversed segments could otherwise share time that neither of them covers.
    shared = torch.minimum(shared, torch.minimum(length_a, length_b))
    union = length_a + length_b - shared
    instants = union == 0
    overlap = shared / torch.where(instants, 1, union)
    return torch.where(instants, (start_a == start_b).to(overlap.dtype), overlap)


def without_repetitions(found: Detections, second: Tensor, *, iou: float) -> Detections:
    """Hard non-maximum suppression between two views, within each class.

    Repeatedly, the remaining detection with the highest score (on ties the first) is kept, and
    detections of its class in the other view are removed if their tIoU with it is at least `iou`.
    Detections of the same view do not suppress one another.

    Args:
        found: N detections in both views, in one unit.
        second: `(N,)` bool, true for detections of the second view.
        iou: least tIoU of two detections of the same action, above 0.

    Returns:
        The remaining detections in their order.
    """
    order = found.scores.argsort(descending=True, stable=True)
    ranked, view = found[order], second[order]
    same = (ranked.labels[:, None] == ranked.labels) & (view[:, None] != view)  # (N, N)
    same &= tiou(ranked.segments[:, None], ranked.segments) >= iou
    kept = torch.ones(len(found), dtype=torch.bool)
    # Only rows with a repetition matter; they are few, by falling score.
    for row in same.any(dim=1).nonzero()[:, 0].tolist():
        if kept[row]:  # a removed detection suppresses nothing
            kept &= ~same[row]
    return found[order[kept].sort().values]  # back in the order given
