"""Models of short clips behind a localizer: a window is cut into clips, which run as one batch.

    window (B, 3, T, H, W) -> clips (B T/n, 3, n, H, W) -> tokens (B T/n, n/s, places, C)
                           -> mean over the places, clips behind one another -> (B, C, T/s)

with the n frames of a clip and the s frames of a token. Nothing mixes clips before the localizer,
but for neighbours where features are interpolated to a higher rate.

A family of such models is one `ClipFamily`, in a file of its own (`videomae.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.resampling import resample
from re2tal.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFamily:
    """Record of one library's models of clips.

    Attributes:
        make: function from a configuration to the model. Its parts and parameters become the
            backbone's own, under their names.
        tokens: function from the backbone, with the model's parts, and a video `(B, 3, T, H, W)` to
            the tokens `(B T/n, n/s, places, C)` of its clips.
        block: names of the parameters of a block; group 1 is its number, from 0.
        stem: beginning of the names of parameters before the first block.
    """

    make: Callable[[Any], nn.Module]
    tokens: Callable[[Any, Tensor], Tensor]
    block: re.Pattern[str]
    stem: str


@dataclass(slots=True)
class Timeline:
    """Place in time of the tokens `(B clips, steps places, C)` of a backbone of clips.

    Attributes:
        steps: time steps of a clip.
        clips: clips of a window, in the forward that runs or ran last.
    """

    steps: int
    clips: int = 1

    def copy(self) -> Timeline:
        """Return the timeline of this moment."""
        return replace(self)


class ClipBackbone(nn.Module):
    """Backbone that runs a model of clips on a whole window.

    See `re2tal.backbones.protocol.Backbone` for the attributes; `timeline` is for modules that mix
    the clips of a window.

    Args:
        model: model of clips, whose parts are taken over.
        family: record of the model's family.
        channels: C of its tokens.
        blocks: number of its blocks.
        clip: frames of a clip.
        stride: frames of a token.
        pooling: consecutive features that are averaged into one.
        interpolation: features that are made of one, by linear interpolation over the window.

    Raises:
        ValueError: a feature would stand for a fraction of a frame.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ClipFamily,
        *,
        channels: int,
        blocks: int,
        clip: int,
        stride: int,
        pooling: int,
        interpolation: int = 1,
    ) -> None:
        super().__init__()
        if stride * pooling % interpolation:
            raise ValueError(
                f"{interpolation} features cannot be made of every {stride * pooling} frames: "
                "choose an interpolation that divides them."
            )
        for name, part in model.named_children():
            self.add_module(name, part)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.channels = channels
        self.temporal_stride = stride * pooling // interpolation
        self.multiple = math.lcm(clip, stride * pooling)
        self.timeline = Timeline(clip // stride)
        self._clip = clip
        self._family = family
        self._blocks = blocks
        self._pooling = pooling

    def forward(self, video: Tensor) -> Tensor:
        """Compute spatially pooled features; see `Backbone`."""
        if video.shape[2] % self.multiple:
            raise UserError(
                f"A window must have a multiple of {self.multiple} frames for this backbone, but "
                f"has {video.shape[2]}."
            )
        features = self.places(video).mean(dim=2)
        pooled: Tensor = features.unflatten(1, (-1, self._pooling)).mean(dim=2)
        at_own_rate = pooled.transpose(1, 2).contiguous()
        return resample(at_own_rate, video.shape[2] // self.temporal_stride)

    def places(self, video: Tensor) -> Tensor:
        """Compute features before pooling; see `Placed`."""
        self.timeline.clips = video.shape[2] // self._clip
        tokens: Tensor = self._family.tokens(self, video)
        return tokens.unflatten(0, (len(video), -1)).flatten(1, 2)

    def layer_of(self, name: str) -> int:
        """Layer as in `Backbone`; what follows the blocks belongs to the last."""
        if name.startswith(self._family.stem):
            return 0
        match = self._family.block.match(name)
        return int(match[1]) + 1 if match else self._blocks


def clips_of(video: Tensor, frames: int) -> Tensor:
    """Cut videos `(B, 3, T, H, W)` into clips `(B T/frames, 3, frames, H, W)`."""
    clips: Tensor = video.unflatten(2, (-1, frames)).transpose(1, 2).flatten(0, 1)
    return clips


def sines(grid: tuple[int, int, int], channels: int) -> Tensor:
    """Sine table of the places of a grid in their order, `(*grid, channels)`."""
    place = torch.arange(math.prod(grid), dtype=torch.float64)[:, None]
    channel = torch.arange(channels, dtype=torch.float64)
    angle = place / 10000 ** (2 * (channel // 2) / channels)
    table = torch.where(channel % 2 == 0, angle.sin(), angle.cos())
    return table.float().view(*grid, channels)


def resized(positions: Tensor, grid: torch.Size) -> Tensor:
    """Resize a table `(t, h, w, C)` to a grid: bicubic in space, linear in time."""
    if positions.shape[1:3] != grid[1:]:
        images = F.interpolate(positions.movedim(-1, 1), size=tuple(grid[1:]), mode="bicubic")
        positions = images.movedim(1, -1)
    if len(positions) != grid[0]:
        lines = positions.flatten(1).T[None]
        positions = F.interpolate(lines, size=grid[0], mode="linear")[0].T.unflatten(
            1, (*grid[1:], -1)
        )
    return positions
