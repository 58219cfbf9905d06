"""Multiscale Vision Transformers (arXiv 2104.11227, 2112.01526) clip by clip.

Version 1 has absolute position embeddings, version 2 relative ones in every attention; both are
resized for other clips and frame sizes than those of the pretraining. Classes and names are
torchvision's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.video.mvit import MSBlockConfig, MViT

from re2tal.backbones.clips import (
    ClipConfig,
    ClipFamily,
    ClipStem,
    check_patches,
    clips_of,
    resized,
)
from re2tal.backbones.table import backbone
from re2tal.errors import check_within
from re2tal.weights import Colour

MEAN: Colour = (0.45, 0.45, 0.45)
STD: Colour = (0.225, 0.225, 0.225)

_PATCH, _TUBELET = 4, 2  # strides in pixels and frames of the patches, which overlap


@dataclass(frozen=True, kw_only=True, slots=True)
class MViTConfig(ClipConfig):
    """Shape of a Multiscale Vision Transformer.

    Attributes:
        version: 1 or 2 for MViT and MViTv2.
        channels: channels of the first stage; they double from stage to stage.
        heads: attention heads of the first stage; they double likewise.
        depths: blocks of each stage; the first block of every stage but the first halves height and
            width.
        clip: frames of a clip.
        trained_clip: frames of a clip in the pretraining, which sets the number of positions.
        trained_size: side of the frames in the pretraining in pixels, likewise.
        drop_path: probability of dropping the last block's branches; it grows with depth.
    """

    version: Literal[1, 2] = 2
    channels: int = 96
    heads: int = 1
    depths: tuple[int, ...] = (1, 2, 11, 2)
    clip: int = 16
    trained_clip: int = 16
    trained_size: int = 224
    drop_path: float = 0.2

    def __post_init__(self) -> None:
        check_within(
            self,
            channels=(1, 2**14),
            heads=(1, 2**10),
            depths=(1, 512),
            clip=(1, 2**10),
            trained_clip=(1, 2**10),
            trained_size=(1, 2**12),
            drop_path=(0, 1),
            pooling=(1, 2**10),
        )
        if not 1 <= len(self.depths) <= 6 or sum(self.depths) < 2:
            raise ValueError(
                f"An MViT needs 1 to 6 stages and at least two blocks, but depths is {self.depths}."
            )
        halvings = 2 ** (len(self.depths) - 1)
        for name, part, why in (
            ("channels", self.heads, "heads"),
            ("clip", _TUBELET, "frames of a token"),
            ("trained_clip", _TUBELET, "frames of a token"),
            ("trained_size", _PATCH * halvings, "pixels of a token of the last stage"),
        ):
            if getattr(self, name) % part:
                raise ValueError(
                    f"MViTConfig.{name} must be a multiple of the {part} {why}, but is "
                    f"{getattr(self, name)}."
                )

    @property
    def token_frames(self) -> int:
        """Frames of a token; see `ClipConfig`."""
        return _TUBELET

    @property
    def token_channels(self) -> int:
        """Channels after the last stage; see `ClipConfig`."""
        channels: int = self.channels * 2 ** (len(self.depths) - 1)
        return channels

    def clip_family(self) -> ClipFamily:
        """Return the record of these models; see `ClipConfig`."""
        return ClipFamily(
            make=_make,
            tokens=partial(_tokens, self),
            block=re.compile(r"blocks\.(\d+)\."),
            stem=("conv_proj.", "pos_encoding."),
        )


class ClipPatches(ClipStem, nn.Conv3d):
    """Patch embedding of the clips of a window: a convolution under torchvision's names."""

    def __init__(self, convolution: nn.Conv3d, clip: int) -> None:
        super().__init__(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]  # three of them
            convolution.stride,  # type: ignore[arg-type]
            convolution.padding,  # type: ignore[arg-type]
        )
        self._clip = clip

    def forward(self, video: Tensor) -> Tensor:  # noqa: D102 - the name that nn.Module gives it
        check_patches(video, self)
        return super().forward(clips_of(video, self._clip))


def _make(config: MViTConfig) -> nn.Module:
    second = config.version == 2
    model: Any = MViT(
        spatial_size=(config.trained_size, config.trained_size),
        temporal_size=config.trained_clip,
        block_setting=_blocks(config),
        residual_pool=second,
        residual_with_cls_embed=False,
        rel_pos_embed=second,
        proj_after_attn=second,
        stochastic_depth_prob=config.drop_path,
    )
    model.head = nn.Identity()
    model.conv_proj = ClipPatches(model.conv_proj, config.clip)
    made: nn.Module = model
    return made


def _blocks(config: MViTConfig) -> list[MSBlockConfig]:
    """List torchvision's settings of all blocks.

    Channels double where height and width are halved: in version 2 in the attention of that block,
    in version 1 in the MLP of the block before. Keys and values are pooled to the last stage's
    height and width.
    """
    second, kernel = config.version == 2, [3, 3, 3]
    stages = [stage for stage, depth in enumerate(config.depths) for _ in range(depth)]
    settings = []
    for before, stage, after in zip([0, *stages], stages, [*stages[1:], stages[-1]], strict=False):
        halves = stage > before
        pools_queries = second or halves
        at = (before, stage) if second else (stage, after)
        keys = 2 ** (len(config.depths) - 1 - stage)  # stride down to the last stage's places
        settings.append(
            MSBlockConfig(
                num_heads=config.heads * 2**stage,
                input_channels=config.channels * 2 ** at[0],
                output_channels=config.channels * 2 ** at[1],
                kernel_q=kernel if pools_queries else [],
                kernel_kv=kernel,
                stride_q=[1, 1 + halves, 1 + halves] if pools_queries else [],
                stride_kv=[1, keys, keys],
            )
        )
    return settings


def _tokens(config: MViTConfig, parts: Any, video: Tensor) -> Tensor:
    patches = parts.conv_proj(video).movedim(1, -1)
    grid = patches.shape[1:4]
    first = parts.pos_encoding.class_token
    if config.version == 1:
        side = config.trained_size // _PATCH
        # separable embeddings: (t, 1, 1, C) + (h, w, C)
        over_time = parts.pos_encoding.temporal_pos[:, None, None]
        positions = over_time + parts.pos_encoding.spatial_pos.unflatten(0, (side, side))
        patches = patches + resized(positions, grid)
        first = first + parts.pos_encoding.class_pos
    tokens = torch.cat([first.expand(len(patches), 1, -1), patches.flatten(1, 3)], dim=1)
    thw = tuple(grid)
    for block in parts.blocks:
        tokens, thw = block(tokens, thw)
    # without the class token; (B T/n, t, h w, C)
    by_time: Tensor = parts.norm(tokens)[:, 1:].unflatten(1, (thw[0], -1))
    return by_time


@backbone(mean=MEAN, std=STD, weights=("torchvision:mvit_v1_b/KINETICS400_V1",))
def mvit_v1_b() -> MViTConfig:
    """MViT-B, the shape of torchvision's `mvit_v1_b`."""
    return MViTConfig(version=1)


@backbone(mean=MEAN, std=STD, weights=("torchvision:mvit_v2_s/KINETICS400_V1",))
def mvit_v2_s() -> MViTConfig:
    """MViTv2-S, the shape of torchvision's `mvit_v2_s`."""
    return MViTConfig()
