"""Supplementary scores: whether an action starts, ends or goes on at a feature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.vsgn.adjustment import first_and_last
from re2tal.localizers.vsgn.losses import mean_over
from re2tal.localizers.vsgn.matching import Instances

# Width of the region around a start or an end that counts as such, in features.
REGION = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LogScores:
    """Logarithms of a score p at T features.

    Attributes:
        yes: `(B, T)` float32, log p.
        no: `(B, T)` float32, log(1 - p).
    """

    yes: Tensor
    no: Tensor

    def loss(self, positive: Tensor, valid: Tensor) -> Tensor:
        """Balanced binary log loss (Lin et al., ECCV 2018, equation 3).

        With weights so that positives and negatives count the same it is half the mean of each.

        Args:
            positive: `(B, T)` bool.
            valid: `(B, T)` bool, which features count.
        """
        return (mean_over(-self.yes, valid & positive) + mean_over(-self.no, valid & ~positive)) / 2


class ScoreHead(nn.Module):
    """One score for each feature, from the pyramid's finest level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.last = nn.Conv1d(channels, 1, 1)

    def forward(self, finest: Tensor, length: int) -> LogScores:
        """Scores `length` features from `finest` `(B, C, N)`."""
        logits = self.last(F.relu(self.conv(finest)))[:, 0].float()
        return LogScores(
            yes=interpolated(F.logsigmoid(logits), length),
            no=interpolated(F.logsigmoid(-logits), length),
        )


def interpolated(logs: Tensor, length: int) -> Tensor:
    """The logarithm of the linear interpolation of `exp(logs)`, first and last value kept.

    Args:
        logs: `(B, N)`.
        length: T.

    Returns:
        `(B, T)`.
    """
    count = logs.shape[1]
    position = torch.linspace(0, count - 1, length, device=logs.device)
    before = position.long().clamp(max=max(count - 2, 0))
    behind = (before + 1).clamp(max=count - 1)
    share = position - before
    return torch.logaddexp(logs[:, before] + (1 - share).log(), logs[:, behind] + share.log())


@torch.no_grad()
def boundary_features(times: Tensor, real: Tensor, length: int) -> Tensor:
    """The features at boundaries: more than half of what they cover lies in a region around one.

    A feature covers half a unit to either side, so that is those less than half the region's
    width away.

    Args:
        times: `(B, N)` of the boundaries, in feature-grid units.
        real: `(B, N)` bool, false for what is no boundary.
        length: T.

    Returns:
        `(B, T)` bool.
    """
    feature = torch.arange(length, device=times.device)[None, :, None]
    near = (feature - times[:, None]).abs() < REGION / 2
    return (near & real[:, None]).any(dim=2)


@torch.no_grad()
def action_features(instances: Instances, length: int) -> Tensor:
    """The features more than half of what they cover lies in an action: `(B, T)` bool."""
    feature = torch.arange(length, device=instances.labels.device)[None, :, None]
    start, end = instances.segments[:, None].unbind(dim=-1)
    covered = torch.minimum(feature + 0.5, end) - torch.maximum(feature - 0.5, start)
    return ((covered > 0.5) & (instances.labels >= 0)[:, None]).any(dim=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Of B samples the three scores."""

    start: LogScores
    end: LogScores
    action: LogScores

    def losses(self, instances: Instances, mask: Tensor) -> dict[str, Tensor]:
        """The loss of each score, over the features in `mask` `(B, T)`."""
        length, real = mask.shape[1], instances.labels >= 0
        starts, ends = instances.segments.unbind(dim=-1)
        return {
            "start": self.start.loss(boundary_features(starts, real, length), mask),
            "end": self.end.loss(boundary_features(ends, real, length), mask),
            "action": self.action.loss(action_features(instances, length), mask),
        }

    def of_boundaries(self, segments: Tensor) -> Tensor:
        """Start score times end score of segments that lie inside the window.

        Each is the mean of those of the two features next to the first, or the last, feature
        inside the segment.

        Args:
            segments: `(B, A, 2)` in feature-grid units.

        Returns:
            `(B, A)`.
        """
        means = [
            (score.gather(1, place.floor().long()) + score.gather(1, place.ceil().long())) / 2
            for score, place in zip(
                (self.start.yes.exp(), self.end.yes.exp()), first_and_last(segments), strict=True
            )
        ]
        return means[0] * means[1]


class SupplementaryHeads(nn.Module):
    """The heads of the three scores (Zhao et al., ICCV 2021, section 3.4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.start = ScoreHead(channels)
        self.end = ScoreHead(channels)
        self.action = ScoreHead(channels)

    def forward(self, finest: Tensor, length: int) -> Scores:
        """Scores `length` features from the finest level `(B, C, N)`."""
        return Scores(
            start=self.start(finest, length),
            end=self.end(finest, length),
            action=self.action(finest, length),
        )
