"""V-JEPA 2 (Assran et al., 2025, arXiv 2506.09985) clip by clip: its encoder, without predictor.

Its blocks are the classes of Hugging Face transformers, under their names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from re2tal.backbones.clips import (
    ClipFamily,
    ClipStem,
    TransformerConfig,
    library,
    patches,
)
from re2tal.backbones.table import Layout, backbone


@dataclass(frozen=True, kw_only=True, slots=True)
class VJEPA2Config(TransformerConfig):
    """Shape of V-JEPA 2's encoder.

    Its position embeddings are rotary, by frame, row and column, for any size and length: nothing
    is resized for other sizes than those of the training.

    Attributes:
        tubelet: frames of a token; the temporal stride.
        clip: frames of a clip, 64 in the pretraining; with 16, attention costs a quarter.
        norm_epsilon: epsilon of all norms.
        drop_path: probability of dropping the last block's branches; it grows with depth.
        attention_dropout: probability of dropout of attention weights.
    """

    tubelet: int = 2
    channels: int = 1024
    depths: tuple[int, ...] = (24,)
    heads: int = 16
    clip: int = 64
    norm_epsilon: float = 1e-6
    drop_path: float = 0.0
    attention_dropout: float = 0.0

    def clip_family(self) -> ClipFamily:
        """Return the record of these models; see `ClipConfig`."""
        return _FAMILY


class VJEPA2Stem(ClipStem):
    """Tokens of the clips of a window.

    Args:
        embeddings: transformers' module with the convolution `proj`.
        config: shape of the backbone.
    """

    def __init__(self, embeddings: nn.Module, config: VJEPA2Config) -> None:
        super().__init__()
        self.patch_embeddings: Any = embeddings
        self._clip = config.clip

    def forward(self, video: Tensor) -> Tensor:
        """Compute tokens `(B T/n, n/s, H', W', C)` of a video `(B, 3, T, H, W)`."""
        return patches(self.patch_embeddings.proj, video, self._clip)


_SIDE = 2**10  # side of the grid in which transformers numbers the places


def _make(config: VJEPA2Config) -> nn.Module:
    transformers = library("transformers", "V-JEPA 2")
    hidden = round(config.channels * config.mlp_ratio)
    encoder: nn.Module = transformers.VJEPA2Model(
        transformers.VJEPA2Config(
            patch_size=config.patch,
            tubelet_size=config.tubelet,
            crop_size=_SIDE * config.patch,
            frames_per_clip=config.clip,
            hidden_size=config.channels,
            num_hidden_layers=config.depths[0],
            num_attention_heads=config.heads,
            mlp_ratio=(hidden + 0.5) / config.channels,  # transformers truncates ratio * channels
            layer_norm_eps=config.norm_epsilon,
            drop_path_rate=config.drop_path,
            attention_probs_dropout_prob=config.attention_dropout,
            # The predictor is not part of the backbone.
            pred_hidden_size=1,
            pred_num_attention_heads=1,
            pred_num_hidden_layers=1,
            pred_num_mask_tokens=1,
        )
    ).encoder
    parts: Any = encoder
    parts.embeddings = VJEPA2Stem(parts.embeddings.patch_embeddings, config)
    return encoder


def _tokens(parts: Any, video: Tensor) -> Tensor:
    stem: Tensor = parts.embeddings(video)
    frames, rows, columns = (torch.arange(n, device=stem.device) for n in stem.shape[1:4])
    numbers = (frames[:, None, None] * _SIDE + rows[:, None]) * _SIDE + columns
    places = numbers.view(1, -1)  # one row for all clips, so that the batch can be cut into pieces
    tokens = stem.flatten(1, 3)
    for layer in parts.layer:
        tokens = layer(tokens, places)[0]
    tokens = parts.layernorm(tokens)
    by_time: Tensor = tokens.unflatten(1, (stem.shape[1], -1))
    return by_time


_FAMILY = ClipFamily(
    make=_make, tokens=_tokens, block=re.compile(r"layer\.(\d+)\."), stem="embeddings."
)

VJEPA2 = Layout(
    title="V-JEPA 2 of transformers",
    # The prefix distinguishes the encoder from the predictor and a classifier's pooler.
    mark=re.compile(r"((?:|.*\.)encoder\.)embeddings\.patch_embeddings\.proj\.weight"),
    rename=lambda name: name,
)

# Names of the authors' modules -> transformers'.
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_FUSED = re.compile(r"attn\.qkv\.(weight|bias)\[([012])\]")
_KEPT = re.compile(r"(?:norm1|norm2|mlp\.fc1|mlp\.fc2)\.(?:weight|bias)")


def _of_authors(name: str) -> str | None:
    if match := re.fullmatch(r"(patch_embed\.proj|norm)\.(weight|bias)", name):
        ours = "layernorm" if match[1] == "norm" else "embeddings.patch_embeddings.proj"
        return f"{ours}.{match[2]}"
    block = _IN_BLOCK.fullmatch(name)
    if block is None:
        return None
    layer, part = f"layer.{block[1]}", block[2]
    if match := _FUSED.fullmatch(part):
        return f"{layer}.attention.{('query', 'key', 'value')[int(match[2])]}.{match[1]}"
    if part.startswith("attn.proj."):
        return f"{layer}.{part.replace('attn', 'attention', 1)}"
    return f"{layer}.{part}" if _KEPT.fullmatch(part) else None


AUTHORS_VJEPA2 = Layout(
    title="V-JEPA 2 of its authors",
    mark=re.compile(r"(module\.backbone\.)blocks\.0\.attn\.qkv\.weight"),
    beside="blocks.0.attn.qkv.bias",
    rename=_of_authors,
    computed=re.compile(r"pos_embed"),  # not used by models with rotary embeddings
    fused=re.compile(r"blocks\.\d+\.attn\.qkv\.(?:weight|bias)"),
)
_LAYOUTS = (VJEPA2, AUTHORS_VJEPA2)


@backbone(weights=("hf:facebook/vjepa2-vitl-fpc64-256",), layouts=_LAYOUTS)
def vjepa2_l() -> VJEPA2Config:
    """V-JEPA 2 ViT-L, pretrained on 64 frames of 256 pixels."""
    return VJEPA2Config()


@backbone(weights=("hf:facebook/vjepa2-vith-fpc64-256",), layouts=_LAYOUTS)
def vjepa2_h() -> VJEPA2Config:
    """V-JEPA 2 ViT-H, pretrained on 64 frames of 256 pixels."""
    return VJEPA2Config(channels=1280, depths=(32,))


@backbone(
    weights=("hf:facebook/vjepa2-vitg-fpc64-256", "hf:facebook/vjepa2-vitg-fpc64-384"),
    layouts=_LAYOUTS,
)
def vjepa2_g() -> VJEPA2Config:
    """V-JEPA 2 ViT-g, pretrained on 64 frames of 256 or 384 pixels."""
    return VJEPA2Config(channels=1408, depths=(40,), heads=22, mlp_ratio=48 / 11)
