"""InternVideo2 (Wang et al., ECCV 2024, arXiv 2403.15377) clip by clip: its video encoder.

A vision transformer with RMS norms, normalised queries and keys, and learnt scales of the branches.
Its parameters have the authors' names, except for the stem. The pooling to one vector per clip and
the projections to language are left out: features are the tokens of the last block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.clips import (
    ClipFamily,
    ClipStem,
    TransformerConfig,
    other_positions,
    patches,
    with_class_token,
)
from re2tal.backbones.table import Layout, backbone
from re2tal.reversible.branches import Branch, branches
from re2tal.reversible.families.vit import SelfAttention, mlp_cut


@dataclass(frozen=True, kw_only=True, slots=True)
class InternVideo2Config(TransformerConfig):
    """Shape of InternVideo2's video encoder.

    Attributes:
        tubelet: frames of a token; the temporal stride.
        clip: frames of a clip.
        trained_clip: frames of a clip in the training of the weights, which sets the number of
            learnt positions: 4 or 8 (`f4`, `f8` in file names), 16 in some finetuned on Kinetics.
        trained_size: side of the frames in that training in pixels, likewise. For other sizes,
            positions are resized in every forward, bicubic in space and linear in time.
        norm_epsilon: epsilon of all norms.
        scale: initial value of the learnt scales of the branches.
    """

    patch: int = 14
    tubelet: int = 1
    channels: int = 1408
    depths: tuple[int, ...] = (40,)
    heads: int = 16
    mlp_ratio: float = 48 / 11
    clip: int = 8
    trained_clip: int = 8
    trained_size: int = 224
    norm_epsilon: float = 1e-6
    scale: float = 1e-5

    def clip_family(self) -> ClipFamily:
        """Return the record of these models; see `ClipConfig`."""
        return _FAMILY


class InternVideo2Stem(ClipStem):
    """Class token and tokens of the clips of a window, with their positions.

    Args:
        config: shape of the backbone.
    """

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        self.frames = config.clip // config.tubelet
        self._clip = config.clip
        self._trained = config.trained_clip // config.tubelet
        places = self._trained * (config.trained_size // config.patch) ** 2
        kernel = (config.tubelet, config.patch, config.patch)
        self.proj = nn.Conv3d(3, config.channels, kernel, stride=kernel)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + places, config.channels))
        for learnt in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(learnt, std=0.02)

    def forward(self, video: Tensor) -> Tensor:
        """Compute tokens `(B T/n, 1 + n/s H' W', C)` of a video `(B, 3, T, H, W)`."""
        tokens = patches(self.proj, video, self._clip)
        return with_class_token(tokens, self.cls_token, self.pos_embed, self._trained)


class RMSNorm(nn.RMSNorm):
    """RMS norm, computed in float32 for any input type."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        normed = F.rms_norm(x.float(), tuple(self.normalized_shape), self.weight.float(), self.eps)
        return normed.type_as(x)


class Attention(nn.Module):
    """Attention among all tokens, with queries and keys normalised over all heads together."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.channels, 3 * config.channels, bias=False)
        self.q_norm = RMSNorm(config.channels, eps=config.norm_epsilon)
        self.k_norm = RMSNorm(config.channels, eps=config.norm_epsilon)
        self.proj = nn.Linear(config.channels, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among `(B, N, C)`."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        apart = (self.q_norm(q), self.k_norm(k), v)
        # (B, heads, N, C / heads) each
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in apart)
        joined = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        result: Tensor = self.proj(joined)
        return result


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `(..., C)`."""
        result: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return result


class Scale(nn.Module):
    """Learnt factor for every channel (LayerScale)."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, in float32 as in the authors' code."""
        return (x.float() * self.gamma.float()).type_as(x)


class Block(nn.Module):
    """Transformer block: `x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.channels, eps=config.norm_epsilon)
        self.attn = Attention(config)
        self.ls1 = Scale(config.channels, config.scale)
        self.norm2 = RMSNorm(config.channels, eps=config.norm_epsilon)
        self.mlp = Mlp(config.channels, round(config.channels * config.mlp_ratio))
        self.ls2 = Scale(config.channels, config.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `(B, N, C)`."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        result: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return result


_WIDTH = 18
"""Elements per token and channel that an attention keeps in memory: those of a vision
transformer's attention (13), normalised queries and keys and their gradients, the scaled result."""


@branches.register
def _block(block: Block) -> list[Branch]:
    channels, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
    return [
        Branch(
            "attention",
            (block.norm1, block.attn, block.ls1),
            cut=SelfAttention(_WIDTH * channels),
        ),
        Branch("mlp", (block.norm2, block.mlp, block.ls2), cut=mlp_cut(channels, hidden)),
    ]


class Encoder(nn.Module):
    """Stem and blocks.

    Args:
        config: shape of the backbone.
    """

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        self.stem = InternVideo2Stem(config)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depths[0])))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _tokens(parts: Any, video: Tensor) -> Tensor:
    tokens: Tensor = parts.blocks(parts.stem(video))
    by_time: Tensor = tokens[:, 1:].unflatten(1, (parts.stem.frames, -1))
    return by_time


_FAMILY = ClipFamily(
    make=Encoder,
    tokens=_tokens,
    block=re.compile(r"blocks\.(\d+)\."),
    stem="stem.",
    first=1,
)

_IN_STEM = re.compile(r"(?:patch_embed\.(proj\.(?:weight|bias))|(cls_token|pos_embed))")


def _renamed(name: str) -> str:
    match = _IN_STEM.fullmatch(name)
    return f"stem.{match[1] or match[2]}" if match else name


INTERNVIDEO2 = Layout(
    title="InternVideo2 of its authors",
    # The encoder alone, or with a prefix inside the whole model beside the language encoder.
    mark=re.compile(r"(|.*\.)blocks\.0\.attn\.qkv\.weight"),
    beside="blocks.0.attn.q_norm.weight",
    rename=_renamed,
    classifier=re.compile(r"(?:clip_projector|fc_norm|head)\."),
    outside=re.compile(
        r"(?:clip_|mae_|final_clip_)decoder\..+|(?:clip_|mae_|img_|clip_img_)pos_embed"
    ),
    objection=other_positions("stem.pos_embed"),
)


@backbone(layouts=(INTERNVIDEO2,))
def internvideo2_s() -> InternVideo2Config:
    """InternVideo2-S/14, distilled from the 1B."""
    return InternVideo2Config(channels=384, depths=(12,), heads=6, mlp_ratio=4.0)


@backbone(layouts=(INTERNVIDEO2,))
def internvideo2_b() -> InternVideo2Config:
    """InternVideo2-B/14, distilled from the 1B."""
    return InternVideo2Config(channels=768, depths=(12,), heads=12, mlp_ratio=4.0)


@backbone(layouts=(INTERNVIDEO2,))
def internvideo2_l() -> InternVideo2Config:
    """InternVideo2-L/14, distilled from the 1B."""
    return InternVideo2Config(channels=1024, depths=(24,), heads=16, mlp_ratio=4.0)


@backbone(layouts=(INTERNVIDEO2,))
def internvideo2_1b() -> InternVideo2Config:
    """InternVideo2-1B, of stage 1 and 2 of the pretraining or finetuned, 8 frames of 224 pixels."""
    return InternVideo2Config()
