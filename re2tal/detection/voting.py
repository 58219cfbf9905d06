"""Segment voting: what is left after suppression moves to the mean of what it overlaps."""

from __future__ import annotations

import torch
from torch import Tensor

from re2tal.detection.segments import tiou

# Pairs of a kept segment and a voter that are compared at a time, which bounds the memory.
_PAIRS = 1 << 21


def vote(
    kept: Tensor,
    kept_groups: Tensor,
    voters: Tensor,
    scores: Tensor,
    groups: Tensor,
    *,
    iou: float,
    by_overlap: bool,
) -> Tensor:
    """The weighted mean of the segments of its group that overlap each segment kept.

    Args:
        kept: `(K, 2)` segments after suppression.
        kept_groups: `(K,)` their groups.
        voters: `(N, 2)` segments before suppression, with those kept.
        scores: `(N,)` their scores before suppression: the weights.
        groups: `(N,)` their groups; only segments of the same group vote.
        iou: the tIoU from which a segment votes.
        by_overlap: weights are multiplied by the tIoU.

    Returns:
        `(K, 2)` the means; a segment whose voters have no weight at all stays.
    """
    means = [kept[:0]]
    step = max(1, _PAIRS // max(1, len(voters)))
    for part, own in zip(kept.split(step), kept_groups.split(step), strict=True):
        overlap = tiou(part[:, None], voters[None])
        votes = (overlap >= iou) & (own[:, None] == groups[None])
        weights = votes * scores
        if by_overlap:
            weights = weights * overlap
        total = weights.sum(dim=1, keepdim=True)
        weighed = total > 0
        # Not a matrix product: its rounding may depend on where its operands lie in memory.
        sums = torch.stack([(weights * side).sum(dim=1) for side in voters.unbind(dim=1)], dim=1)
        means.append(torch.where(weighed, sums / torch.where(weighed, total, 1), part))
    return torch.cat(means)
