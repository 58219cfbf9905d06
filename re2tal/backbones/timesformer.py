"""TimeSformer (Bertasius et al., ICML 2021, arXiv 2102.05095), divided attention, clip by clip.

Its blocks are the classes of Hugging Face transformers, under their names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.clips import (
    ClipFamily,
    ClipStem,
    LibraryConfig,
    library,
    other_positions,
    patches,
    side_of,
)
from re2tal.backbones.table import Layout, backbone


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeSformerConfig(LibraryConfig):
    """Shape of a TimeSformer, whose tokens have one frame each.

    Attributes:
        clip: frames of a clip.
        trained_clip: frames of a clip in the training of the weights, which sets the number of
            learnt time embeddings.
        trained_size: side of the frames in that training in pixels, likewise for places. For other
            sizes, every place and frame takes the nearest embedding, in every forward, as in the
            authors' code and transformers.
    """

    clip: int = 8
    trained_clip: int = 8
    trained_size: int = 224

    def clip_family(self) -> ClipFamily:
        """Return the record of these models; see `ClipConfig`."""
        return _FAMILY


class TimeSformerStem(ClipStem):
    """Class token and tokens of the clips of a window, with embeddings of places and frames.

    Args:
        embeddings: transformers' module with the convolution `projection`.
        config: shape of the backbone.
    """

    def __init__(self, embeddings: nn.Module, config: TimeSformerConfig) -> None:
        super().__init__()
        self.frames = config.clip
        places = (config.trained_size // config.patch) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.channels))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + places, config.channels))
        self.time_embeddings = nn.Parameter(torch.zeros(1, config.trained_clip, config.channels))
        self.patch_embeddings: Any = embeddings
        for learnt in (self.cls_token, self.position_embeddings, self.time_embeddings):
            nn.init.trunc_normal_(learnt, std=0.02)

    def forward(self, video: Tensor) -> Tensor:
        """Compute tokens `(B T/n, 1 + H' W' n, C)` of a video `(B, 3, T, H, W)`, by place."""
        tokens = patches(self.patch_embeddings.projection, video, self.frames)
        side = side_of(self.position_embeddings)
        square = self.position_embeddings[:, 1:].unflatten(1, (side, side)).movedim(3, 1)
        # nearest, the default of F.interpolate
        places = F.interpolate(square, size=tuple(tokens.shape[2:4])).movedim(1, -1)
        times = F.interpolate(self.time_embeddings.transpose(1, 2), size=self.frames)
        tokens = tokens + places[:, None].type_as(tokens)
        tokens = tokens + times.transpose(1, 2)[..., None, None, :].type_as(tokens)
        first = (self.cls_token + self.position_embeddings[:, :1]).type_as(tokens)
        by_place = tokens.movedim(1, 3).flatten(1, 3)  # (B T/n, H' W' n, C)
        return torch.cat((first.expand(len(tokens), -1, -1), by_place), dim=1)


def _make(config: TimeSformerConfig) -> nn.Module:
    transformers = library("transformers", "TimeSformer")
    theirs: Any = transformers.TimesformerModel(
        transformers.TimesformerConfig(
            # `TimeSformerStem` holds the embeddings. With images of one patch, transformers'
            # blocks do not require the training's frame size.
            image_size=config.patch,
            patch_size=config.patch,
            num_frames=config.clip,
            **config.settings(),
        )
    )
    theirs.embeddings = TimeSformerStem(theirs.embeddings.patch_embeddings, config)
    model: nn.Module = theirs
    return model


def _tokens(parts: Any, video: Tensor) -> Tensor:
    tokens: Tensor = parts.embeddings(video)
    for layer in parts.encoder.layer:
        tokens = layer(tokens)[0]
    tokens = parts.layernorm(tokens)[:, 1:]
    by_place: Tensor = tokens.unflatten(1, (-1, parts.embeddings.frames))
    return by_place.transpose(1, 2)


_FAMILY = ClipFamily(
    make=_make,
    tokens=_tokens,
    block=re.compile(r"encoder\.layer\.(\d+)\."),
    stem="embeddings.",
    first=1,
    by_place=True,
)

# Mean and deviation of the frames in training, from the authors' code.
_MEAN, _STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)

TIMESFORMER = Layout(
    title="TimeSformer of transformers",
    mark=re.compile(r"(|.*\.)encoder\.layer\.0\.temporal_attention\.attention\.qkv\.weight"),
    rename=lambda name: name,
    mean=_MEAN,
    std=_STD,
    objection=other_positions("embeddings.position_embeddings", "embeddings.time_embeddings"),
)

# Names of the authors' modules -> transformers'.
_OUTSIDE_BLOCKS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "time_embed": "embeddings.time_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_PARTS = {
    "temporal_norm1": "temporal_layernorm",
    "temporal_attn.qkv": "temporal_attention.attention.qkv",
    "temporal_attn.proj": "temporal_attention.output.dense",
    "temporal_fc": "temporal_dense",
    "norm1": "layernorm_before",
    "attn.qkv": "attention.attention.qkv",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _of_authors(name: str) -> str | None:
    match = _IN_BLOCK.fullmatch(name)
    if match is None:
        return _OUTSIDE_BLOCKS.get(name)
    part = _PARTS.get(match[2])
    return f"encoder.layer.{match[1]}.{part}.{match[3]}" if part else None


AUTHORS_TIMESFORMER = replace(
    TIMESFORMER,
    title="TimeSformer of its authors",
    mark=re.compile(r"(|.*\.)blocks\.0\.temporal_attn\.qkv\.weight"),
    beside="time_embed",
    rename=_of_authors,
    classifier=re.compile(r"head\."),
)


@backbone(
    mean=_MEAN,
    std=_STD,
    weights=("hf:facebook/timesformer-base-finetuned-k400",),
    layouts=(TIMESFORMER, AUTHORS_TIMESFORMER),
)
def timesformer_b() -> TimeSformerConfig:
    """TimeSformer-B, as finetuned on Kinetics-400, 8 frames of 224 pixels."""
    return TimeSformerConfig()
