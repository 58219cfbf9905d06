"""Models of short clips behind a localizer: a window is cut into clips, which run as one batch.

    window (B, 3, T, H, W) -> clips (B T/n, 3, n, H, W) -> tokens (B T/n, n/s, places, C)
                           -> mean over the places, clips behind one another -> (B, C, T/s)

with the n frames of a clip and the s frames of a token. Nothing mixes clips before the localizer.

A family of such models is one `ClipFamily`, in a file of its own (`videomae.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        stem: beginning of the names of parameters before the first block, or several.
    """

    make: Callable[[Any], nn.Module]
    tokens: Callable[[Any, Tensor], Tensor]
    block: re.Pattern[str]
    stem: str | tuple[str, ...]


class ClipBackbone(nn.Module):
    """Backbone that runs a model of clips on a whole window.

    See `re2tal.backbones.protocol.Backbone` for the attributes.

    Args:
        model: model of clips, whose parts are taken over.
        family: record of the model's family.
        channels: C of its tokens.
        blocks: number of its blocks.
        clip: frames of a clip.
        stride: frames of a token.
        pooling: consecutive features that are averaged into one.
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
    ) -> None:
        super().__init__()
        for name, part in model.named_children():
            self.add_module(name, part)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.channels = channels
        self.temporal_stride = stride * pooling
        self.multiple = math.lcm(clip, self.temporal_stride)
        self._family = family
        self._blocks = blocks
        self._pooling = pooling

    def forward(self, video: Tensor) -> Tensor:
        """Compute spatially pooled features; see `Backbone`."""
        check_window(video, self.multiple)
        features = self._family.tokens(self, video).mean(dim=2)
        in_order = features.unflatten(0, (len(video), -1)).flatten(1, 2)
        pooled: Tensor = in_order.unflatten(1, (-1, self._pooling)).mean(dim=2)
        return pooled.transpose(1, 2).contiguous()

    def layer_of(self, name: str) -> int:
        """Layer as in `Backbone`; what follows the blocks belongs to the last."""
        if name.startswith(self._family.stem):
            return 0
        match = self._family.block.match(name)
        return int(match[1]) + 1 if match else self._blocks


def library(module: str, model: str) -> Any:
    """Import a module of a library that is an extra of this package.

    Args:
        module: name of the module, such as "transformers".
        model: model that is built from it, for the error.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{model} is built from the library {module.partition('.')[0]}, which cannot be "
            f"imported ({error}): pip install 're2tal[backbones]'."
        ) from error


def check_window(video: Tensor, multiple: int) -> None:
    """Refuse a window `(B, 3, T, H, W)` of a length that a backbone cannot have.

    Raises:
        UserError: T is no multiple of `multiple`.
    """
    if video.shape[2] % multiple:
        raise UserError(
            f"A window must have a multiple of {multiple} frames for this backbone, but has "
            f"{video.shape[2]}."
        )


def check_patches(video: Tensor, patch: int) -> None:
    """Refuse frames `(..., H, W)` that cannot be cut into square patches.

    Raises:
        UserError: a side is no multiple of that of a patch.
    """
    height, width = video.shape[-2:]
    if height % patch or width % patch:
        raise UserError(
            f"Frames of {height} x {width} pixels cannot be cut into patches of {patch}: choose a "
            "size that is a multiple of it."
        )


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
