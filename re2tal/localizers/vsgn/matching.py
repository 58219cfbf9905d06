"""VSGN's anchors, their matching with actions, and the targets of its scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from re2tal.detection.segments import tiou
from re2tal.localizers.losses import mean_over
from re2tal.localizers.protocol import Instances
from re2tal.localizers.vsgn.heads import SCORES

# The network predicts the shift of the centre in tenths of the anchor's length, and five times the
# logarithm of the ratio of lengths, which is bounded.
SHIFT_SCALE = 10.0
GROWTH_SCALE = 5.0
GREATEST_GROWTH = math.log(1000 / 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchors:
    """Anchors of all levels, A of them: level by level, node by node, scale by scale.

    Attributes:
        centres: `(A,)` in feature-grid units; whole numbers.
        lengths: `(A,)` in feature-grid units.
    """

    centres: Tensor
    lengths: Tensor

    @property
    def segments(self) -> Tensor:
        """Starts and ends, `(A, 2)`."""
        return torch.stack(
            [self.centres - self.lengths / 2, self.centres + self.lengths / 2], dim=1
        )

    def decode(self, regression: Tensor) -> Tensor:
        """Decode predictions into segments in feature-grid units.

        With prediction (p, q), an anchor of centre c and length l becomes
        `centre = c + p l / 10`, `length = l exp(q / 5)`.

        Args:
            regression: `(B, A, 2)` float32.

        Returns:
            `(B, A, 2)` starts and ends; all lengths are positive.
        """
        centre = self.centres + regression[..., 0] / SHIFT_SCALE * self.lengths
        growth = (regression[..., 1] / GROWTH_SCALE).clamp(max=GREATEST_GROWTH)
        half = growth.exp() * self.lengths / 2
        return torch.stack([centre - half, centre + half], dim=-1)


def make_anchors(
    length: int, strides: Sequence[int], scales: Sequence[float], device: torch.device
) -> Anchors:
    """Lay out the anchors over `length` features.

    A node of stride s has anchors of length s times each scale. The centre of the level's k-th node
    is at k s + s / 2: half a feature after the middle of its cell, as in the authors' release.
    """
    centres, lengths = [], []
    for stride in strides:
        node = torch.arange(length // stride, device=device) * stride + stride / 2
        centres.append(node.repeat_interleave(len(scales)))
        lengths.append(stride * torch.tensor(scales, device=device).repeat(length // stride))
    return Anchors(centres=torch.cat(centres), lengths=torch.cat(lengths))


def anchors_of_nodes(levels: Sequence[Tensor], scales: int) -> Tensor:
    """Repeat the values of nodes for their anchors.

    Args:
        levels: values of the nodes of each level, `(B, N)`.
        scales: number of anchors of a node.

    Returns:
        `(B, A)` in the order of `make_anchors`.
    """
    return torch.cat(list(levels), dim=1).repeat_interleave(scales, dim=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Matches:
    """Target classes and segments of A segments.

    Attributes:
        classes: `(B, A)` int64: 0 for the background, otherwise the action's label + 1.
        segments: `(B, A, 2)` segments of the actions; meaningless where not positive.
    """

    classes: Tensor
    segments: Tensor

    @property
    def positive(self) -> Tensor:
        """Mask `(B, A)` of the segments that match an action."""
        return self.classes > 0


@torch.no_grad()
def match(segments: Tensor, valid: Tensor, instances: Instances, threshold: float) -> Matches:
    """Match each segment with the action of greatest tIoU (Zhao et al., ICCV 2021, section 3.4).

    A segment is positive if its tIoU reaches `threshold`, or if it is the best segment of some
    action. So every action that overlaps any segment is trained on. A best segment still gets the
    action of its own greatest tIoU. An action that overlaps no segment has no positives.

    Args:
        segments: `(B, A, 2)`.
        valid: `(B, A)` bool; other segments are never positive.
        instances: the actions.
        threshold: least tIoU of a positive.
    """
    overlap = tiou(segments[:, :, None], instances.segments[:, None])  # (B, A, N)
    overlap = torch.where(valid[:, :, None], overlap, 0)
    best, chosen = overlap.max(dim=2)
    # All segments that tie for an action's best are positive.
    unsurpassed = (overlap == overlap.amax(dim=1, keepdim=True)).logical_and(overlap > 0)
    positive = (best >= threshold) | unsurpassed.any(dim=2)
    classes = instances.labels.gather(1, chosen) + 1
    return Matches(
        classes=torch.where(positive, classes, 0),
        segments=instances.segments.gather(1, chosen[..., None].expand(-1, -1, 2)),
    )


# Width of the region around a boundary that counts as start or end, in features.
REGION = 3.0


@torch.no_grad()
def score_targets(instances: Instances, length: int) -> Tensor:
    """Mark the features at which actions start, end or go on: `(B, 3, T)` bool.

    The cell of a feature reaches half a unit to either side. A feature is a start or an end if more
    than half of its cell lies in a region of three features around the boundary (Lin et al., ECCV
    2018, section 3.3), that is, if it is less than 1.5 features away. It is part of an action if
    more than half of its cell lies inside the action.
    """
    feature = torch.arange(length, device=instances.labels.device)[None, :, None]
    start, end = instances.segments[:, None].unbind(dim=-1)  # (B, 1, N)
    inside = torch.minimum(feature + 0.5, end) - torch.maximum(feature - 0.5, start)
    is_at = torch.stack(
        [(feature - start).abs() < REGION / 2, (feature - end).abs() < REGION / 2, inside > 0.5],
        dim=1,
    )
    return (is_at & (instances.labels >= 0)[:, None, None]).any(dim=3)


def score_losses(
    yes: Tensor, no: Tensor, targets: Tensor, mask: Tensor, *, all_ranks: bool = False
) -> dict[str, Tensor]:
    """Compute the balanced binary log loss of each score (Lin et al., ECCV 2018, equation 3).

    Positives and negatives weigh the same: the loss is half the sum of their two means.

    Args:
        yes: `(B, 3, T)` logarithms of the scores.
        no: `(B, 3, T)` logarithms of one minus the scores.
        targets: `(B, 3, T)` bool.
        mask: `(B, T)` bool, true at features that count.
        all_ranks: see `mean_over`.
    """
    losses = {}
    for i, name in enumerate(SCORES):
        positive, negative = mask & targets[:, i], mask & ~targets[:, i]
        of_positives = mean_over(-yes[:, i], positive, all_ranks=all_ranks)
        of_negatives = mean_over(-no[:, i], negative, all_ranks=all_ranks)
        losses[name] = (of_positives + of_negatives) / 2
    return losses
