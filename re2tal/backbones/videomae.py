"""VideoMAE (Tong et al., NeurIPS 2022, arXiv 2203.12602) clip by clip.

Its blocks are the classes of Hugging Face transformers, under their names: transformers' files fit,
and `re2tal.rewire` makes the blocks reversible in place. transformers is imported only when a model
is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from re2tal.backbones.clips import (
    ClipFamily,
    ClipStem,
    LibraryConfig,
    library,
    patches,
    resized,
    sines,
)
from re2tal.backbones.table import Layout, backbone


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoMAEConfig(LibraryConfig):
    """Shape of VideoMAE's encoder, a vision transformer of clips.

    Attributes:
        tubelet: frames of a token; the temporal stride.
        clip: frames of a clip.
        trained_clip: frames of a clip in the pretraining, which sets the number of positions.
        trained_size: side of the frames in the pretraining in pixels, likewise. For other sizes,
            position embeddings are resized, as in mmaction2 and OpenTAD.
        qkv_bias: add biases to queries and values.
        norm: normalize the last block's tokens, as in files of the pretraining; files finetuned for
            classification have no such norm.
        interpolation: number of features made of each, by linear interpolation over the window:
            with 2, as in AdaTAD on THUMOS-14, there is one feature per frame.
    """

    tubelet: int = 2
    clip: int = 16
    trained_clip: int = 16
    trained_size: int = 224
    qkv_bias: bool = True
    norm: bool = False
    norm_epsilon: float = 1e-12
    interpolation: int = 1

    def clip_family(self) -> ClipFamily:
        """Return the record of these models; see `ClipConfig`."""
        return _FAMILY


class VideoMAEStem(ClipStem):
    """Tokens of the clips of a window, with their positions.

    Args:
        embeddings: transformers' module with the convolution `projection`.
        config: shape of the backbone.
    """

    positions: Tensor

    def __init__(self, embeddings: nn.Module, config: VideoMAEConfig) -> None:
        super().__init__()
        self.patch_embeddings: Any = embeddings
        self._clip = config.clip
        side = config.trained_size // config.patch
        table = sines((config.trained_clip // config.tubelet, side, side), config.channels)
        self.register_buffer("positions", table, persistent=False)  # files do not have the table

    def forward(self, video: Tensor) -> Tensor:
        """Compute tokens `(B T/n, n/s, H', W', C)` of a video `(B, 3, T, H, W)`."""
        tokens = patches(self.patch_embeddings.projection, video, self._clip)
        return tokens + resized(self.positions, tokens.shape[1:4]).type_as(tokens)


def _make_videomae(config: VideoMAEConfig) -> nn.Module:
    transformers = library("transformers", "VideoMAE")
    theirs: Any = transformers.VideoMAEModel(
        transformers.VideoMAEConfig(
            # Size and frames affect no parameter, only a table of positions, which takes seconds to
            # compute and is replaced by that of `VideoMAEStem`.
            image_size=config.patch,
            num_frames=config.tubelet,
            patch_size=config.patch,
            tubelet_size=config.tubelet,
            **config.settings(),
            qv_bias=config.qkv_bias,
            use_mean_pooling=not config.norm,
        )
    )
    theirs.embeddings = VideoMAEStem(theirs.embeddings.patch_embeddings, config)
    model: nn.Module = theirs
    return model


def _videomae_tokens(parts: Any, video: Tensor) -> Tensor:
    stem: Tensor = parts.embeddings(video)
    tokens: Tensor = parts.encoder(stem.flatten(1, 3)).last_hidden_state
    if hasattr(parts, "layernorm"):
        tokens = parts.layernorm(tokens)
    by_time: Tensor = tokens.unflatten(1, (stem.shape[1], -1))
    return by_time


_FAMILY = ClipFamily(
    make=_make_videomae,
    tokens=_videomae_tokens,
    block=re.compile(r"encoder\.layer\.(\d+)\."),
    stem="embeddings.",
)

_KNOWN = re.compile(
    r"(?:embeddings\.patch_embeddings\.projection|layernorm|encoder\.layer\.\d+\."
    r"(?:attention\.attention\.(?:query|key|value)|attention\.output\.dense|intermediate\.dense"
    r"|output\.dense|layernorm_before|layernorm_after))\.(?:weight|bias)"
)
# In earlier versions of transformers, these biases were not in the linear layers.
_OLD_BIAS = re.compile(r"(encoder\.layer\.\d+\.attention\.attention\.)([qv])_bias")


def _renamed(name: str) -> str | None:
    if match := _OLD_BIAS.fullmatch(name):
        return f"{match[1]}{'query' if match[2] == 'q' else 'value'}.bias"
    return name if _KNOWN.fullmatch(name) else None


def _of_another_function(backbone: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    stem = getattr(backbone, "embeddings", None)
    if not isinstance(stem, VideoMAEStem):
        return None
    norm = "layernorm.weight" in weights
    if norm != hasattr(backbone, "layernorm"):
        verb, option = ("normalize", "norm") if norm else ("do not normalize", "no-norm")
        return f"they {verb} the last tokens: set norm={norm} (--model.backbone.{option})"
    theirs = weights.get("pos_embed")
    ours = stem.positions.flatten(0, 2)[None]
    if theirs is None or (theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-4)):
        return None
    return (
        f"their positions {tuple(theirs.shape)} are not the sines {tuple(ours.shape)} of this "
        "backbone: set trained_clip and trained_size to the frames and pixels of their training, "
        "if they are not learnt"
    )


VIDEOMAE = Layout(
    title="VideoMAE of transformers",
    mark=re.compile(r"(|.*\.)encoder\.layer\.0\.attention\.attention\.query\.weight"),
    rename=_renamed,
    objection=_of_another_function,
)


# Names of the authors' and of mmaction2's modules -> transformers'.
_STEM_AND_END = re.compile(r"(patch_embed\.proj(?:ection)?|norm)\.(weight|bias)")
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_PARTS = {
    "attn.qkv.weight[0]": "attention.attention.query.weight",
    "attn.qkv.weight[1]": "attention.attention.key.weight",
    "attn.qkv.weight[2]": "attention.attention.value.weight",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    **{
        f"{theirs}.{leaf}": f"{ours}.{leaf}"
        for theirs, ours in {
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "attn.proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
            "mlp.layers.0.0": "intermediate.dense",  # mmaction2's
            "mlp.layers.1": "output.dense",
        }.items()
        for leaf in ("weight", "bias")
    },
}


def _of_authors(name: str) -> str | None:
    if match := _STEM_AND_END.fullmatch(name):
        ours = "layernorm" if match[1] == "norm" else "embeddings.patch_embeddings.projection"
        return f"{ours}.{match[2]}"
    match = _IN_BLOCK.fullmatch(name)
    part = _PARTS.get(match[2]) if match else None
    return f"encoder.layer.{match[1]}.{part}" if match and part else None


AUTHORS_VIDEOMAE = Layout(
    title="VideoMAE of its authors or of mmaction2",
    mark=re.compile(r"(?!.*decoder\.)(|.*\.)blocks\.0\.attn\.qkv\.weight"),
    beside="blocks.0.attn.q_bias",
    rename=_of_authors,
    classifier=re.compile(r"(?:fc_norm|head)\.(?:weight|bias)"),
    computed=re.compile(r"pos_embed"),
    fused=re.compile(r"blocks\.\d+\.attn\.qkv\.weight"),
    objection=_of_another_function,
)
VIDEOMAE_TOY_WEIGHTS = str(Path(__file__).parent / "weights" / "toy_videomae.safetensors")
_LAYOUTS = (VIDEOMAE, AUTHORS_VIDEOMAE)


@backbone(weights=("hf:MCG-NJU/videomae-small-finetuned-kinetics",), layouts=_LAYOUTS)
def videomae_s() -> VideoMAEConfig:
    """VideoMAE-S, as finetuned on Kinetics-400."""
    return VideoMAEConfig(channels=384, heads=6)


@backbone(
    weights=("hf:MCG-NJU/videomae-base-finetuned-kinetics", "hf:MCG-NJU/videomae-base"),
    layouts=_LAYOUTS,
)
def videomae_b() -> VideoMAEConfig:
    """VideoMAE-B, as finetuned on Kinetics-400; its pretraining alone needs `norm=True`."""
    return VideoMAEConfig()


@backbone(
    weights=("hf:MCG-NJU/videomae-large-finetuned-kinetics", "hf:MCG-NJU/videomae-large"),
    layouts=_LAYOUTS,
)
def videomae_l() -> VideoMAEConfig:
    """VideoMAE-L, as finetuned on Kinetics-400; its pretraining alone needs `norm=True`."""
    return VideoMAEConfig(channels=1024, depths=(24,), heads=16)


@backbone(weights=("hf:MCG-NJU/videomae-huge-finetuned-kinetics",), layouts=_LAYOUTS)
def videomae_h() -> VideoMAEConfig:
    """VideoMAE-H, as finetuned on Kinetics-400."""
    return VideoMAEConfig(channels=1280, depths=(32,), heads=16)


# VideoMAE V2 (Wang et al., CVPR 2023, arXiv 2303.16727): weights of its authors only.


@backbone(layouts=_LAYOUTS)
def videomae_v2_s() -> VideoMAEConfig:
    """VideoMAE V2-S, distilled from V2-g."""
    return replace(videomae_s(), norm_epsilon=1e-6)


@backbone(weights=("hf:OpenGVLab/VideoMAEv2-Base",), layouts=_LAYOUTS)
def videomae_v2_b() -> VideoMAEConfig:
    """VideoMAE V2-B, distilled from V2-g."""
    return replace(videomae_b(), norm_epsilon=1e-6)


@backbone(layouts=_LAYOUTS)
def videomae_v2_g() -> VideoMAEConfig:
    """VideoMAE V2-g, the shape in its paper."""
    return VideoMAEConfig(
        patch=14, channels=1408, depths=(40,), heads=16, mlp_ratio=48 / 11, norm_epsilon=1e-6
    )


@backbone(weights=(VIDEOMAE_TOY_WEIGHTS,), layouts=_LAYOUTS)
def videomae_toy() -> VideoMAEConfig:
    """Small VideoMAE for the toy data set: 64 pixels, minutes on two CPU cores."""
    return VideoMAEConfig(channels=96, depths=(4,), heads=4, trained_size=64, norm=True)
