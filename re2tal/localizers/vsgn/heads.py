"""VSGN's heads: classes and segments of anchors, adjusted boundaries, and supplementary scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.layers import MaskedGroupNorm
from re2tal.localizers.vsgn.graph import rows


class Head(nn.Module):
    """Head of `layers` convolutions with group norm and ReLU, and a last one that predicts.

    Args:
        width: channels of the features and of the layers.
        per_anchor: number of values that are predicted for an anchor.
        anchors: anchors of a node.
        layers: convolutions before the last.
        groups: groups of the group norm.
    """

    def __init__(
        self, width: int, per_anchor: int, *, anchors: int, layers: int, groups: int
    ) -> None:
        super().__init__()
        self.per_anchor = per_anchor
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(layers))
        self.norms = nn.ModuleList(MaskedGroupNorm(groups, width) for _ in range(layers))
        self.last = nn.Conv1d(width, anchors * per_anchor, 3, padding=1)

    def forward(self, levels: Sequence[Tensor], valid: Sequence[Tensor]) -> Tensor:
        """Predict for the A anchors of all levels, in the order of `make_anchors`.

        Args:
            levels: features of each level, `(B, width, N)`, zero where padded.
            valid: masks of each level, `(B, N)` bool.

        Returns:
            `(B, A, per_anchor)` float32.
        """
        predicted = torch.cat(
            [self._level(x, inside) for x, inside in zip(levels, valid, strict=True)], dim=2
        )
        places = predicted.float().transpose(1, 2)  # (B, nodes, anchors * per_anchor)
        anchors: Tensor = places.unflatten(2, (-1, self.per_anchor)).flatten(1, 2)
        return anchors

    def _level(self, x: Tensor, valid: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x), valid))
        predicted: Tensor = self.last(x)
        return predicted


# Distance of the sampled features before and after a boundary, as a share of the segment's length.
REACH = 1 / 8


class BoundaryAdjustment(nn.Module):
    """Second regression of starts and ends, from the features around them.

    Boundary adjustment of Zhao et al., ICCV 2021, section 3.4.

    Args:
        channels: channels of the pyramid's finest level.
        stride: stride of its nodes, in features.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.start = Shift(channels)
        self.end = Shift(channels)

    def forward(self, segments: Tensor, finest: Tensor) -> Tensor:
        """Move the starts and ends of segments.

        Args:
            segments: `(B, A, 2)` in feature-grid units; gradients flow to them.
            finest: `(B, C, N)` finest level.

        Returns:
            `(B, A, 2)`; an end may come before its start.
        """
        nodes = finest.transpose(1, 2)
        # Positions only select nodes, which has no gradient.
        clamped = inside_window(segments.detach(), finest.shape[2] * self.stride)
        reach = REACH * (clamped[..., 1] - clamped[..., 0])
        shifts = []
        for module, position in zip((self.start, self.end), first_and_last(clamped), strict=True):
            around = (position - reach, position, position + reach)
            shifts.append(module(nodes, *(self._node(p, finest.shape[2]) for p in around)))
        return segments + torch.stack(shifts, dim=-1)

    def _node(self, position: Tensor, count: int) -> Tensor:
        """Find the node, of `count`, whose cell contains the feature at `position`."""
        return (position / self.stride).floor().long().clamp(0, count - 1)


class Shift(nn.Module):
    """Head that predicts the shift of one boundary from three nodes around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.taps = nn.Conv1d(channels, channels, 3)
        self.last = nn.Conv1d(channels, 1, 1)

    def forward(self, nodes: Tensor, before: Tensor, at: Tensor, behind: Tensor) -> Tensor:
        """Predict shifts `(B, A)`, float32, from `nodes` `(B, N, C)` and `(B, A)` indices."""
        # Each tap of the convolution is applied once to the N nodes, not to the 3 A gathered ones.
        weight = self.taps.weight.permute(2, 0, 1).flatten(0, 1)
        left, centre, right = F.linear(nodes, weight).chunk(3, dim=2)
        assert self.taps.bias is not None
        hidden = rows(left, before) + rows(centre, at) + rows(right, behind) + self.taps.bias
        shift: Tensor = self.last(F.relu(hidden).transpose(1, 2))
        return shift[:, 0].float()


def inside_window(segments: Tensor, length: int) -> Tensor:
    """Clamp the boundaries of `segments` `(..., 2)` to a window of `length` features.

    A segment outside the window becomes the cell of its first or last feature.
    """
    start, end = segments.unbind(dim=-1)
    return torch.stack([start.clamp(-0.5, length - 1.5), end.clamp(0.5, length - 0.5)], dim=-1)


def first_and_last(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Locate the first and the last feature inside `segments` `(..., 2)`, without rounding."""
    return segments[..., 0] + 0.5, segments[..., 1] - 0.5


# Order of the scores in all tensors.
SCORES = ("start", "end", "action")


class SupplementaryScores(nn.Module):
    """Scores of starts, ends and actions (Zhao et al., ICCV 2021, section 3.4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: ScoreHead(channels) for name in SCORES})

    def forward(self, finest: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Score `length` features from the finest level `(B, C, N)`.

        Returns:
            Logarithms of the scores, and of one minus the scores, `(B, 3, T)` float32 each.
        """
        logits = torch.cat([head(finest) for head in self.heads.values()], dim=1)
        return (
            log_interpolated(F.logsigmoid(logits), length),
            log_interpolated(F.logsigmoid(-logits), length),
        )


class ScoreHead(nn.Module):
    """Head of one score: a logit for each node of the pyramid's finest level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.last = nn.Conv1d(channels, 1, 1)

    def forward(self, finest: Tensor) -> Tensor:
        """Predict logits `(B, 1, N)` in float32 from `(B, C, N)`."""
        logits: Tensor = self.last(F.relu(self.conv(finest)))
        return logits.float()


def log_interpolated(logs: Tensor, length: int) -> Tensor:
    """Interpolate `exp(logs)` linearly, and return the logarithm.

    Scores are interpolated, not logits. The result is a logarithm, because the loss of a score near
    0 or 1 needs it to full precision. The first and the last value stay in place.

    Args:
        logs: `(..., N)`.
        length: length T of the result.

    Returns:
        `(..., T)`.
    """
    count = logs.shape[-1]
    position = torch.linspace(0, count - 1, length, device=logs.device)
    # The last position lies between the last two nodes with share 1; log(0) = -inf adds nothing.
    before = position.long().clamp(max=max(count - 2, 0))
    behind = (before + 1).clamp(max=count - 1)
    share = position - before
    return torch.logaddexp(logs[..., before] + (1 - share).log(), logs[..., behind] + share.log())


def boundary_scores(yes: Tensor, segments: Tensor) -> Tensor:
    """Multiply the start score and the end score of segments inside the window.

    Each score is the mean of the two features next to the unrounded position of the segment's first
    or last feature.

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
