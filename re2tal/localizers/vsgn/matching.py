"""Which action each anchor has to find."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from re2tal.detection.segments import tiou


@dataclass(frozen=True, kw_only=True, slots=True)
class Instances:
    """The actions of B samples, at most N each.

    Attributes:
        segments: `(B, N, 2)` float32 in feature-grid units.
        labels: `(B, N)` int64, -1 where a sample has fewer; the segment there is an instant, which
            overlaps nothing.
    """

    segments: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Matches:
    """What each of A segments has to become.

    Attributes:
        classes: `(B, A)` int64, 0 for the background and 1 + the action's label.
        segments: `(B, A, 2)` those of the actions; they mean something at positives only.
    """

    classes: Tensor
    segments: Tensor

    @property
    def positive(self) -> Tensor:
        """`(B, A)` bool, which have an action."""
        return self.classes > 0


@torch.no_grad()
def match(segments: Tensor, valid: Tensor, instances: Instances, threshold: float) -> Matches:
    """Gives segments the action that they overlap most (Zhao et al., ICCV 2021, section 3.4).

    A segment is positive when the overlap reaches `threshold`, or when no segment overlaps some
    action more than it does: so every action that anything overlaps is trained on. Such a segment
    still gets the action that it itself overlaps most.

    The overlap is the plain tIoU. An action that nothing overlaps has no positives.

    Args:
        segments: `(B, A, 2)`.
        valid: `(B, A)` bool; others are never positive.
        instances: the actions.
        threshold: tIoU.
    """
    overlap = tiou(segments[:, :, None], instances.segments[:, None])  # (B, A, N)
    overlap = torch.where(valid[:, :, None], overlap, 0)
    best, chosen = overlap.max(dim=2)
    unsurpassed = (overlap == overlap.amax(dim=1, keepdim=True)).logical_and(overlap > 0)
    positive = (best >= threshold) | unsurpassed.any(dim=2)
    classes = instances.labels.gather(1, chosen) + 1
    return Matches(
        classes=torch.where(positive, classes, 0),
        segments=instances.segments.gather(1, chosen[..., None].expand(-1, -1, 2)),
    )
