"""Boundary adjustment: a second look at the features around a segment's start and end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.vsgn.geometry import rows

# How far before and behind a boundary the features are looked at: this share of the length.
REACH = 1 / 8


def inside_window(segments: Tensor, length: int) -> Tensor:
    """`segments` `(..., 2)` with boundaries clamped to a window of `length` features.

    A segment that lies outside keeps the window's first or last feature.
    """
    start, end = segments.unbind(dim=-1)
    return torch.stack([start.clamp(-0.5, length - 1.5), end.clamp(0.5, length - 0.5)], dim=-1)


def first_and_last(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first and the last feature inside `segments` `(..., 2)` sit, not rounded."""
    return segments[..., 0] + 0.5, segments[..., 1] - 0.5


class Shift(nn.Module):
    """How far one boundary moves, from the features of three nodes around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.taps = nn.Conv1d(channels, channels, 3)
        self.last = nn.Conv1d(channels, 1, 1)

    def forward(self, nodes: Tensor, before: Tensor, at: Tensor, behind: Tensor) -> Tensor:
        """Predicts from `nodes` `(B, N, C)` and indices `(B, A)` of them: `(B, A)` float32."""
        # Every tap is applied to the N nodes, in place of the 3 A that are looked at.
        weight = self.taps.weight.permute(2, 0, 1).flatten(0, 1)
        left, centre, right = F.linear(nodes, weight).chunk(3, dim=2)
        assert self.taps.bias is not None
        hidden = rows(left, before) + rows(centre, at) + rows(right, behind) + self.taps.bias
        shift: Tensor = self.last(F.relu(hidden).transpose(1, 2))
        return shift[:, 0].float()


class BoundaryAdjustment(nn.Module):
    """Moves starts and ends (Zhao et al., ICCV 2021, section 3.4).

    Args:
        channels: of the pyramid's finest level.
        stride: of its nodes, in features.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.start = Shift(channels)
        self.end = Shift(channels)

    def forward(self, segments: Tensor, finest: Tensor) -> Tensor:
        """Adjusts.

        Args:
            segments: `(B, A, 2)` in feature-grid units. Gradients pass through to them.
            finest: `(B, C, N)`, the finest level.

        Returns:
            `(B, A, 2)`; an end may come before its start.
        """
        nodes = finest.transpose(1, 2)
        clamped = inside_window(segments.detach(), finest.shape[2] * self.stride)
        reach = REACH * (clamped[..., 1] - clamped[..., 0])
        shifts = []
        for module, position in zip((self.start, self.end), first_and_last(clamped), strict=True):
            around = (position - reach, position, position + reach)
            shifts.append(module(nodes, *(self._node(p, finest.shape[2]) for p in around)))
        return segments + torch.stack(shifts, dim=-1)

    def _node(self, position: Tensor, count: int) -> Tensor:
        """Which of `count` nodes has the feature at `position` in its cell."""
        return (position / self.stride).floor().long().clamp(0, count - 1)
