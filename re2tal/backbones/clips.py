"""Models of short clips as backbones: a window is cut into clips, which run as one batch.

    window (B, 3, T, H, W) -> clips (B T/n, 3, n, H, W) -> tokens (B T/n, n/s, places, C)
                           -> mean over places, concatenation of clips in time -> (B, C, T/s)

with n frames in a clip and s frames in a token. Clips do not interact before the localizer, except
through adapters (`adapters.py`) and through interpolation between neighbouring features.

A family of such models is one file (like `videomae.py`) with a `ClipFamily` and the dataclass of
its shapes; this module holds the shared code.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.resampling import resample
from re2tal.errors import UserError, check_within
from re2tal.reversible.branches import has_hooks, recomputed


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFamily:
    """Family of models of clips.

    Attributes:
        make: function from a configuration to the model, whose parts and parameters become the
            backbone's, under the same names.
        tokens: function from the backbone, which has the model's parts, and a video
            `(B, 3, T, H, W)` to the tokens `(B T/n, n/s, places, C)` of its clips.
        block: names of a block's parameters; group 1 is the number of the block, from 0.
        first: number of tokens of a clip before those of places, such as a class token.
        by_place: true if a clip's tokens are ordered by place and then by time, false if by time
            and then by place.
        stem: prefix, or prefixes, of the names of parameters before the first block.
    """

    make: Callable[[Any], nn.Module]
    tokens: Callable[[Any, Tensor], Tensor]
    block: re.Pattern[str]
    stem: str | tuple[str, ...]
    first: int = 0
    by_place: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig(ABC):
    """Base of the shapes of models of clips.

    Further fields have the names of those of `VideoMAEConfig`. Only a shape with a field
    `interpolation` can have more than one feature per token.

    Attributes:
        pooling: number of consecutive features that are averaged.
    """

    pooling: int = 1

    @abstractmethod
    def clip_family(self) -> ClipFamily:
        """Return the record of the models of this shape."""

    @property
    def token_frames(self) -> int:
        """Frames of a token, the model's own frames per feature."""
        frames: int = getattr(self, "tubelet", 1)
        return frames

    @property
    @abstractmethod
    def token_channels(self) -> int:
        """Channels of a token after the last block."""

    def with_stride(self, stride: int) -> Self:
        """Return the same backbone with another number of frames per feature.

        Features are averaged for a larger stride than a token's, and interpolated for a smaller.

        Raises:
            ValueError: the backbone does not support that stride.
        """
        own, interpolated = self.token_frames, hasattr(self, "interpolation")
        if stride < 1 or (stride % own and (not interpolated or own % stride)):
            raise ValueError(
                f"The stride must be a multiple of {own}, the frames of one feature of the "
                f"backbone{', or a divisor of it' if interpolated else ''}, not {stride}."
            )
        rates = {"pooling": max(1, stride // own)}
        if interpolated:
            rates["interpolation"] = max(1, own // stride)
        config: Any = self
        changed: Self = replace(config, **rates)
        return changed

    def build(self) -> ClipBackbone:
        """Build a backbone of this shape, with random weights.

        Raises:
            UserError: the library of its blocks is not installed.
        """
        config: Any = self
        family = self.clip_family()
        return ClipBackbone(
            family.make(self),
            family,
            channels=self.token_channels,
            blocks=sum(config.depths),
            clip=config.clip,
            stride=self.token_frames,
            pooling=self.pooling,
            interpolation=getattr(self, "interpolation", 1),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig(ClipConfig):
    """Base of the shapes of vision transformers of constant width; the defaults are a ViT-B's.

    Attributes:
        patch: side of a patch in pixels.
        channels: channels of a token.
        depths: number of blocks of the only stage.
        heads: attention heads of a block.
        mlp_ratio: hidden channels of an MLP, as a multiple of `channels`.
    """

    patch: int = 16
    channels: int = 768
    depths: tuple[int, ...] = (12,)
    heads: int = 12
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        check_shape(self)

    @property
    def token_channels(self) -> int:
        """Channels of a token; see `ClipConfig`."""
        return self.channels


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryConfig(TransformerConfig):
    """Base of the shapes whose blocks are those of the library transformers.

    Attributes:
        norm_epsilon: epsilon of all norms.
        dropout: probability of dropout after attention and MLP.
        attention_dropout: probability of dropout of attention weights.
    """

    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def settings(self) -> dict[str, Any]:
        """Return the settings of the blocks under the library's names."""
        return {
            "hidden_size": self.channels,
            "num_hidden_layers": self.depths[0],
            "num_attention_heads": self.heads,
            "intermediate_size": round(self.channels * self.mlp_ratio),
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.attention_dropout,
            "layer_norm_eps": self.norm_epsilon,
        }


@dataclass(slots=True)
class Timeline:
    """Order in time of the tokens `(B clips, first + steps places, C)` of a clip backbone.

    Attributes:
        steps: time steps of a clip.
        clips: clips of a window, in the current or last forward.
        first: see `ClipFamily`.
        by_place: see `ClipFamily`.
    """

    steps: int
    clips: int = 1
    first: int = 0
    by_place: bool = False

    def copy(self) -> Timeline:
        """Return a copy, which later forwards do not change."""
        return replace(self)


class ClipBackbone(nn.Module):
    """Backbone that runs a model of clips on a whole window.

    See `re2tal.backbones.protocol.Backbone` for the attributes; adapters, which mix the clips of a
    window, read `timeline`.

    Args:
        model: model of clips; the backbone takes over its parts.
        family: family of the model.
        channels: C of its tokens.
        blocks: number of its blocks.
        clip: frames of a clip.
        stride: frames of a token.
        pooling: number of consecutive features that are averaged.
        interpolation: number of features made of each, by linear interpolation over the window.

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
        self.multiple = math.lcm(clip, stride * pooling)  # whole clips, and whole averages
        self.timeline = Timeline(clip // stride, first=family.first, by_place=family.by_place)
        self._clip = clip
        self._family = family
        self._blocks = blocks
        self._pooling = pooling

    def forward(self, video: Tensor) -> Tensor:
        """Compute spatially pooled features; see `Backbone`."""
        check_window(video, self.multiple)
        features = self.places(video).mean(dim=2)
        pooled: Tensor = features.unflatten(1, (-1, self._pooling)).mean(dim=2)
        at_own_rate = pooled.transpose(1, 2).contiguous()
        return resample(at_own_rate, video.shape[2] // self.temporal_stride)

    def places(self, video: Tensor) -> Tensor:
        """Compute features before pooling; see `Placed`."""
        self.timeline.clips = video.shape[2] // self._clip
        tokens: Tensor = self._family.tokens(self, video)
        # (B clips, n/s, places, C) -> (B, T/s, places, C)
        in_order: Tensor = tokens.unflatten(0, (len(video), -1)).flatten(1, 2)
        return in_order

    @property
    def reads_once(self) -> bool:
        """See `Backbone`."""
        stems = [m for name, m in self.named_children() if f"{name}.".startswith(self._family.stem)]
        return not any(map(has_hooks, (self, *stems)))

    def layer_of(self, name: str) -> int:
        """Return the layer as in `Backbone`; parts after the blocks have the last layer."""
        if name.startswith(self._family.stem):
            return 0
        match = self._family.block.match(name)
        return int(match[1]) + 1 if match else self._blocks


class ClipStem(nn.Module):
    """First layer, from a window to the tokens of its clips; recomputed in rewired backbones.

    The stem includes the cut into clips, so only the uint8 frames have to be kept.
    """


@recomputed.register(ClipStem)
def _stem_is_recomputed(module: nn.Module) -> bool:  # noqa: ARG001
    return True


def check_window(video: Tensor, multiple: int) -> None:
    """Refuse a window `(B, 3, T, H, W)` of an unsupported length.

    Raises:
        UserError: T is not a multiple of `multiple`.
    """
    if video.shape[2] % multiple:
        raise UserError(
            f"A window must have a multiple of {multiple} frames for this backbone, but has "
            f"{video.shape[2]}."
        )


def check_patches(video: Tensor, layer: Any) -> None:
    """Refuse frames `(..., H, W)` that are not a multiple of a convolution's strides.

    Raises:
        UserError: the frames cannot be cut into whole patches.
    """
    height, width = video.shape[-2:]
    for pixels, patch in zip((height, width), layer.stride[-2:], strict=True):
        if pixels % patch:
            raise UserError(
                f"Frames of {height} x {width} pixels cannot be cut into patches of {patch}: "
                "choose a size that is a multiple of it."
            )


def patches(projection: nn.Module, video: Tensor, clip: int) -> Tensor:
    """Cut videos into clips of n frames, and clips into tokens `(B T/n, n/s, H', W', C)`.

    Args:
        projection: convolution with stride equal to its kernel, over time and space or space only.
        video: `(B, 3, T, H, W)`.
        clip: frames of a clip.

    Raises:
        UserError: the frames cannot be cut into whole patches.
    """
    layer: Any = projection
    check_patches(video, layer)
    clips = clips_of(video, clip)
    if isinstance(layer, nn.Conv2d):  # frame by frame: (B T, 3, H, W)
        images: Tensor = layer(clips.transpose(1, 2).flatten(0, 1))
        of_images: Tensor = images.unflatten(0, (-1, clip)).movedim(2, -1)
        return of_images
    tokens: Tensor = layer(clips)
    return tokens.movedim(1, -1)


def clips_of(video: Tensor, frames: int) -> Tensor:
    """Cut videos `(B, 3, T, H, W)` into clips `(B T/frames, 3, frames, H, W)`."""
    clips: Tensor = video.unflatten(2, (-1, frames)).transpose(1, 2).flatten(0, 1)
    return clips


def sines(grid: tuple[int, int, int], channels: int) -> Tensor:
    """Make the table of sines for the places of a grid, numbered in order, `(*grid, channels)`."""
    place = torch.arange(math.prod(grid), dtype=torch.float64)[:, None]
    channel = torch.arange(channels, dtype=torch.float64)
    # Sines on even channels, cosines on odd ones, computed in float64.
    angle = place / 10000 ** (2 * (channel // 2) / channels)
    table = torch.where(channel % 2 == 0, angle.sin(), angle.cos())
    return table.float().view(*grid, channels)


def with_class_token(tokens: Tensor, first: Tensor, positions: Tensor, frames: int) -> Tensor:
    """Prepend a class token to the tokens of clips, and add learnt positions.

    If the grid of the positions differs from that of the tokens, they are resized, bicubic in space
    and linear in time. Usual code does so when it loads weights; here every forward does, so one
    file fits all sizes.

    Args:
        tokens: `(B, t, h, w, C)`.
        first: class token `(1, 1, C)`.
        positions: `(1, 1 + places, C)`, the class token's first.
        frames: t of the positions; the places of a time form a square.

    Returns:
        `(B, 1 + t h w, C)`.
    """
    table = positions[0, 1:].unflatten(0, (frames, side_of(positions, frames), -1))
    placed = tokens + resized(table, tokens.shape[1:4]).type_as(tokens)
    first = (first + positions[:, :1]).type_as(tokens).expand(len(tokens), -1, -1)
    return torch.cat((first, placed.flatten(1, 3)), dim=1)


def side_of(positions: Tensor, frames: int = 1) -> int:
    """Return the side of the square of places in learnt positions `(1, 1 + places, C)`."""
    return math.isqrt((positions.shape[1] - 1) // frames)


def resized(positions: Tensor, grid: torch.Size) -> Tensor:
    """Resize a table `(t, h, w, C)` to a grid: bicubic in space, linear in time."""
    if positions.shape[1:3] != grid[1:]:
        # (t, C, h, w): times are the batch
        images = F.interpolate(positions.movedim(-1, 1), size=tuple(grid[1:]), mode="bicubic")
        positions = images.movedim(1, -1)
    if len(positions) != grid[0]:
        lines = positions.flatten(1).T[None]  # (1, h w C, t): places and channels are channels
        positions = F.interpolate(lines, size=grid[0], mode="linear")[0].T.unflatten(
            1, (*grid[1:], -1)
        )
    return positions


_BOUNDS = {
    "patch": (1, 256),
    "tubelet": (1, 64),
    "channels": (1, 2**14),
    "depths": (1, 512),
    "heads": (1, 2**10),
    "mlp_ratio": (0.01, 64),
    "clip": (1, 2**10),
    "trained_clip": (1, 2**10),
    "trained_size": (1, 2**12),
    "norm_epsilon": (0, 1),
    "dropout": (0, 1),
    "attention_dropout": (0, 1),
    "drop_path": (0, 1),
    "scale": (0, 1),
    "pooling": (1, 2**10),
    "interpolation": (1, 2**10),
}


def check_shape(config: Any) -> None:
    """Refuse impossible shapes of a model of clips.

    Args:
        config: dataclass with fields named as `VideoMAEConfig`'s, or some of them.

    Raises:
        ValueError: a field is out of its range, or two fields do not fit.
    """
    kind, known = type(config).__name__, {field.name for field in fields(config)}
    check_within(config, **{name: _BOUNDS[name] for name in _BOUNDS if name in known})
    if len(config.depths) != 1:
        raise ValueError(f"A {kind} has one stage of blocks, but depths is {config.depths}.")
    tubelet = config.tubelet if "tubelet" in known else 1
    for name, part in (
        ("channels", config.heads),
        ("clip", tubelet),
        ("trained_clip", tubelet),
        ("trained_size", config.patch),
    ):
        if name in known and getattr(config, name) % part:
            what = "heads" if name == "channels" else "pixels or frames of a token"
            raise ValueError(
                f"{kind}.{name} must be a multiple of the {part} {what}, but is "
                f"{getattr(config, name)}."
            )
    if "trained_size" in known:
        times = config.trained_clip // tubelet if "trained_clip" in known else 1
        places = times * (config.trained_size // config.patch) ** 2
        if places * config.channels > 2**28:
            raise ValueError(
                f"{kind}: {places:,} positions of {config.channels:,} channels are too many."
            )


def library(name: str, title: str) -> Any:
    """Import a library, or a module of it, that models called `title` need.

    Raises:
        UserError: the library is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"{title} is built from the library {name.partition('.')[0]}, which cannot be imported "
            f"({error}): pip install 're2tal[backbones]'."
        ) from error


def other_positions(*names: str) -> Callable[[nn.Module, Mapping[str, Tensor]], str | None]:
    """Make a `Layout.objection` for learnt positions of the given names.

    Returns:
        Function that objects to a different number of positions and names the options to set.
    """

    def objection(backbone: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
        own = dict(backbone.named_parameters())
        for name in own.keys() & weights.keys() & set(names):
            theirs, ours = tuple(weights[name].shape), tuple(own[name].shape)
            if theirs[1] != ours[1] and theirs[2:] == ours[2:]:
                return (
                    f"their positions {name} are {theirs}, but this backbone's are {ours}: set "
                    "trained_clip and trained_size to the frames and pixels of their training"
                )
        return None

    return objection
