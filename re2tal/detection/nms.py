"""Non-maximum suppression of temporal segments, in pure PyTorch.

The sequential definition, for the detections of one class: take the detection with the highest
score (of equals, the first given), keep it, weaken or remove the others by how much they overlap
it, and repeat. Here all classes do that side by side: one step takes one detection of every
class, so the number of steps is that of the longest class and not the sum of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from re2tal.detection.segments import Detections, tiou

REMOVED = float("-inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsConfig:
    """How the detections of one video are thinned out.

    Attributes:
        method: "soft": Gaussian soft-NMS (Bodla et al., ICCV 2017, eq. 2), which multiplies the
            scores of the others by `exp(-tIoU^2 / sigma)`; "hard": the others go when their tIoU
            reaches `iou`; "none": nothing is suppressed.
        sigma: width of the Gaussian ("soft" only).
        iou: overlap from which a detection is removed ("hard" only; soft-NMS has no use for it).
        per_class: suppress within each class; otherwise among all detections (for proposals).
        min_score: detections below it are dropped, soft-NMS's weakened ones too.
        min_duration: detections shorter than it are dropped first; in the unit of the segments.
        top_k: at most so many detections are kept, the best ones of all classes together.
        voting: what moves a kept segment to the weighted mean of the segments that overlap it by
            at least `voting_iou`, itself included: "score_tiou" weighs by score x tIoU, "score"
            by score, "none" leaves it. Scores are those before suppression. With `per_class`
            only segments of the same class vote; the published recipes vote without it.
        voting_iou: the overlap from which a segment votes.
    """

    method: Literal["soft", "hard", "none"] = "soft"
    sigma: float = 0.5
    iou: float = 0.5
    per_class: bool = True
    min_score: float = 0.001
    min_duration: float = 0.0
    top_k: int = 200
    voting: Literal["none", "score_tiou", "score"] = "none"
    voting_iou: float = 0.7

    def __post_init__(self) -> None:
        if self.sigma <= 0 or self.top_k < 1:
            raise ValueError(
                f"NMS needs sigma > 0 and top_k >= 1, but got {self.sigma} and {self.top_k}."
            )


def nms(detections: Detections, config: NmsConfig) -> Detections:
    """Thins out the detections of one video.

    Deterministic: of equal scores the one given first is taken first, and the result lists equal
    scores in the order given.

    Args:
        detections: N detections in any unit, on any device, without gradients.
        config: what to do.

    Returns:
        At most `config.top_k` detections by falling score, on the same device.

    Raises:
        ValueError: If a score is not a number.
    """
    if bool(detections.scores.isnan().any()):
        raise ValueError("NMS got a detection whose score is not a number (NaN).")
    lengths = detections.segments[:, 1] - detections.segments[:, 0]
    candidates = detections[lengths >= config.min_duration]
    if len(candidates) == 0:
        return candidates
    groups = candidates.labels if config.per_class else torch.zeros_like(candidates.labels)
    scores = _suppress(candidates, groups, config)
    best = scores.argsort(descending=True, stable=True)[: config.top_k]
    best = best[scores[best] >= config.min_score]
    segments = candidates.segments[best]
    if config.voting != "none":
        segments = _vote(segments, groups[best], candidates, groups, config)
    return Detections(segments=segments, scores=scores[best], labels=candidates.labels[best])


def _suppress(candidates: Detections, groups: Tensor, config: NmsConfig) -> Tensor:
    """The scores `(N,)` after suppression within `groups` `(N,)`; `REMOVED` where none is left."""
    if config.method == "none":
        return candidates.scores
    slots, rows = _slots(groups)
    segments = candidates.segments.new_zeros(*slots.shape, 2)
    scores = candidates.scores.new_full(slots.shape, REMOVED)
    filled = slots >= 0
    segments[filled] = candidates.segments[slots[filled]]
    scores[filled] = candidates.scores[slots[filled]]
    kept = torch.full_like(scores, REMOVED)
    # The k-th pick of a group is at most the k-th best of all, so top_k picks are enough.
    for _ in range(min(slots.shape[1], config.top_k)):
        score, pick = scores.max(dim=1)  # of equals the first, which is the first given
        going = score >= config.min_score
        if not bool(going.any()):
            break
        kept[rows[going], pick[going]] = score[going]
        scores[rows, pick] = REMOVED
        overlap = tiou(segments[rows, pick][:, None], segments)
        if config.method == "hard":
            scores = scores.masked_fill(overlap >= config.iou, REMOVED)
        else:
            weakened = scores * torch.exp(overlap.square() / -config.sigma)
            scores = torch.where(scores == REMOVED, REMOVED, weakened)  # -inf x 0 is no number
    result = torch.full_like(candidates.scores, REMOVED)
    result[slots[filled]] = kept[filled]
    return result


def _slots(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the members of each group, padded with -1: `(G, L)`, and `arange(G)`."""
    _, group, counts = groups.unique(return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    first = counts.cumsum(0) - counts
    row = group[order]
    slots = groups.new_full((len(counts), int(counts.max())), -1)
    slots[row, torch.arange(len(order), device=order.device) - first[row]] = order
    return slots, torch.arange(len(counts), device=groups.device)


def _vote(
    kept: Tensor, kept_groups: Tensor, voters: Detections, groups: Tensor, config: NmsConfig
) -> Tensor:
    """The `kept` segments `(K, 2)`, each moved to the weighted mean of its voters."""
    overlap = tiou(kept[:, None], voters.segments[None])
    votes = (overlap >= config.voting_iou) & (kept_groups[:, None] == groups[None])
    weights = torch.where(votes, voters.scores[None], 0)
    if config.voting == "score_tiou":
        weights = weights * overlap
    total = weights.sum(dim=1, keepdim=True)
    # Scores of zero would leave nothing to average.
    return torch.where(total > 0, weights @ voters.segments / total.clamp(min=1e-12), kept)
