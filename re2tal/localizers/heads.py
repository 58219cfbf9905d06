"""Convolutional heads that all levels of a pyramid share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.blocks import Convolution, zero_padding
from re2tal.localizers.pyramid import Pyramid


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """All levels of a pyramid one after the other, a zero after each.

    A convolution of kernel 3 over the strip then equals one over each level by itself, in one
    call in place of one a level, as long as the gaps are kept zero.

    Attributes:
        features: `(B, S, C)`, S = the levels' lengths + 1 each.
        valid: `(B, S)` bool, false on padding and gaps.
        inside: `(S,)` bool, false on gaps.
        points: `(P,)` positions in the strip that are not gaps, level by level.
    """

    features: Tensor
    valid: Tensor
    inside: Tensor
    points: Tensor

    @staticmethod
    def lay_out(pyramid: Pyramid) -> Strip:
        """Lays out a pyramid."""
        features = torch.cat([F.pad(level, (0, 0, 0, 1)) for level in pyramid.features], dim=1)
        valid = torch.cat([F.pad(mask, (0, 1)) for mask in pyramid.masks], dim=1)
        inside = torch.cat(
            [F.pad(torch.ones_like(mask[0]), (0, 1)) for mask in pyramid.masks], dim=0
        )
        starts, position = [], 0
        for mask in pyramid.masks:
            starts.append(torch.arange(position, position + mask.shape[1], device=mask.device))
            position += mask.shape[1] + 1
        return Strip(features=features, valid=valid, inside=inside, points=torch.cat(starts))


class ConvHead(nn.Module):
    """`layers` convolutions, all but the last with layer norm and ReLU, shared by all levels."""

    def __init__(self, in_channels: int, width: int, out_channels: int, *, layers: int) -> None:
        super().__init__()
        channels = [in_channels, *[width] * (layers - 1)]
        self.convs = nn.ModuleList(
            Convolution(before, after, bias=False)  # the norm has one
            for before, after in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers - 1))
        self.last = Convolution(channels[-1], out_channels, bias=True)

    def forward(self, strip: Strip) -> Tensor:
        """Predicts `(B, P, out_channels)` float32 for the points of all levels."""
        x = strip.features
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(zero_padding(conv(x), strip.valid)))
            x = zero_padding(x, strip.inside)
        predicted: Tensor = self.last(x).index_select(1, strip.points)
        return predicted.float()


class LevelScale(nn.Module):
    """A learnt factor for each level, since one head predicts for lengths of all scales."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(levels))

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Scales `x` `(B, P, C)`, whose levels have `lengths` points."""
        parts = x.split(list(lengths), dim=1)
        return torch.cat([part * scale for part, scale in zip(parts, self.scale, strict=True)], 1)
