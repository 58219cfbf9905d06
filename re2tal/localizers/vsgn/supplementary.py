"""Supplementary scores: whether an action starts, ends or goes on at a feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.vsgn.adjustment import first_and_last
from re2tal.localizers.vsgn.losses import mean_over
from re2tal.localizers.vsgn.matching import Instances

# The order of the scores in every tensor.
SCORES = ("start", "end", "action")
# Width of the region around a start or an end that counts as such, in features.
REGION = 3.0


class ScoreHead(nn.Module):
    """The logit of one score for each node of the pyramid's finest level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.last = nn.Conv1d(channels, 1, 1)

    def forward(self, finest: Tensor) -> Tensor:
        """`(B, C, N)` to `(B, 1, N)` float32."""
        logits: Tensor = self.last(F.relu(self.conv(finest)))
        return logits.float()


class SupplementaryScores(nn.Module):
    """The three scores (Zhao et al., ICCV 2021, section 3.4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: ScoreHead(channels) for name in SCORES})

    def forward(self, finest: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Scores `length` features from the finest level `(B, C, N)`.

        Returns:
            `(B, 3, T)` float32 each: the logarithm of each score, and of one minus it.
        """
        logits = torch.cat([head(finest) for head in self.heads.values()], dim=1)
        return (
            log_interpolated(F.logsigmoid(logits), length),
            log_interpolated(F.logsigmoid(-logits), length),
        )


def log_interpolated(logs: Tensor, length: int) -> Tensor:
    """The logarithm of the linear interpolation of `exp(logs)`.

    Scores are interpolated, not their logits, but the loss of a score next to 0 or 1 needs its
    logarithm to full precision. The first and the last value stay where they are.

    Args:
        logs: `(..., N)`.
        length: T.

    Returns:
        `(..., T)`.
    """
    count = logs.shape[-1]
    position = torch.linspace(0, count - 1, length, device=logs.device)
    before = position.long().clamp(max=max(count - 2, 0))
    behind = (before + 1).clamp(max=count - 1)
    share = position - before
    return torch.logaddexp(logs[..., before] + (1 - share).log(), logs[..., behind] + share.log())


@torch.no_grad()
def score_targets(instances: Instances, length: int) -> Tensor:
    """At which features actions start, end or go on: `(B, 3, T)` bool.

    An action starts or ends at the features of whose cell, half a unit to either side, more than
    half lies in a region of three features around the boundary (Lin et al., ECCV 2018, section
    3.3): those less than half the region's width away. It goes on at those of whose cell more than
    half lies inside the action.
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
    """Balanced binary log loss of each score (Lin et al., ECCV 2018, equation 3).

    It weighs positives and negatives so that both count the same: half the mean of each.

    Args:
        yes: `(B, 3, T)` logarithms of the scores.
        no: `(B, 3, T)` logarithms of one minus the scores.
        targets: `(B, 3, T)` bool.
        mask: `(B, T)` bool, which features count.
        all_ranks: as `mean_over`.
    """
    losses = {}
    for i, name in enumerate(SCORES):
        positive, negative = mask & targets[:, i], mask & ~targets[:, i]
        of_positives = mean_over(-yes[:, i], positive, all_ranks=all_ranks)
        of_negatives = mean_over(-no[:, i], negative, all_ranks=all_ranks)
        losses[name] = (of_positives + of_negatives) / 2
    return losses


def boundary_scores(yes: Tensor, segments: Tensor) -> Tensor:
    """Start score times end score of segments that lie inside the window.

    Each is the mean over the two features next to where the first, or last, one inside would be.

    Args:
        yes: `(B, 3, T)` logarithms of the scores.
        segments: `(B, A, 2)` in feature-grid units.

    Returns:
        `(B, A)`.
    """
    means = []
    for score, place in zip(yes.exp().unbind(dim=1), first_and_last(segments), strict=False):
        below, above = place.floor().long(), place.ceil().long()
        means.append((score.gather(1, below) + score.gather(1, above)) / 2)
    return means[0] * means[1]
