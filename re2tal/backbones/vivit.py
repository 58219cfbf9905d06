"""ViViT (Arnab et al., ICCV 2021, arXiv 2103.15691), its model 1, clip by clip.

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
    LibraryConfig,
    library,
    other_positions,
    patches,
    with_class_token,
)
from re2tal.backbones.table import Layout, backbone


@dataclass(frozen=True, kw_only=True, slots=True)
class ViViTConfig(LibraryConfig):
    """Shape of a ViViT with attention among all tokens of a clip.

    Attributes:
        tubelet: frames of a token; the temporal stride.
        clip: frames of a clip.
        trained_clip: frames of a clip in the training of the weights, which sets the number of
            learnt positions.
        trained_size: side of the frames in that training in pixels, likewise. For other sizes,
            positions are resized in every forward, bicubic in space and linear in time.
    """

    tubelet: int = 2
    clip: int = 32
    trained_clip: int = 32
    trained_size: int = 224

    def clip_family(self) -> ClipFamily:
        """Return the record of these models; see `ClipConfig`."""
        return _FAMILY


class ViViTStem(ClipStem):
    """Class token and tokens of the clips of a window, with their positions.

    Args:
        embeddings: transformers' module with the convolution `projection`.
        config: shape of the backbone.
    """

    def __init__(self, embeddings: nn.Module, config: ViViTConfig) -> None:
        super().__init__()
        self.frames = config.clip // config.tubelet
        self._clip = config.clip
        self._trained = config.trained_clip // config.tubelet
        places = self._trained * (config.trained_size // config.patch) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.channels))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + places, config.channels))
        self.patch_embeddings: Any = embeddings
        for learnt in (self.cls_token, self.position_embeddings):
            nn.init.trunc_normal_(learnt, std=0.02)

    def forward(self, video: Tensor) -> Tensor:
        """Compute tokens `(B T/n, 1 + n/s H' W', C)` of a video `(B, 3, T, H, W)`."""
        tokens = patches(self.patch_embeddings.projection, video, self._clip)
        return with_class_token(tokens, self.cls_token, self.position_embeddings, self._trained)


def _make(config: ViViTConfig) -> nn.Module:
    transformers = library("transformers", "ViViT")
    theirs: Any = transformers.VivitModel(
        transformers.VivitConfig(
            # `ViViTStem` holds the positions.
            image_size=config.patch,
            num_frames=config.tubelet,
            tubelet_size=[config.tubelet, config.patch, config.patch],
            **config.settings(),
        ),
        add_pooling_layer=False,
    )
    theirs.embeddings = ViViTStem(theirs.embeddings.patch_embeddings, config)
    model: nn.Module = theirs
    return model


def _tokens(parts: Any, video: Tensor) -> Tensor:
    tokens: Tensor = parts.embeddings(video)
    for layer in parts.layers:
        tokens = layer(tokens)
    tokens = parts.layernorm(tokens)[:, 1:]
    by_time: Tensor = tokens.unflatten(1, (parts.embeddings.frames, -1))
    return by_time


_FAMILY = ClipFamily(
    make=_make,
    tokens=_tokens,
    block=re.compile(r"layers\.(\d+)\."),
    stem="embeddings.",
    first=1,
)

# Names in files, from earlier versions of the library -> its names today.
_IN_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_PARTS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}


def _renamed(name: str) -> str | None:
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        return name
    part = _PARTS.get(match[2])
    return f"layers.{match[1]}.{part}.{match[3]}" if part else None


VIVIT = Layout(
    title="ViViT of transformers",
    mark=re.compile(
        r"(|.*\.)(?:encoder\.layer\.0\.attention\.attention\.query|layers\.0\.attention\.q_proj)"
        r"\.weight"
    ),
    beside="embeddings.cls_token",  # VideoMAE has the same layers, but no class token
    rename=_renamed,
    classifier=re.compile(r"pooler\."),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    objection=other_positions("embeddings.position_embeddings"),
)


@backbone(
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    weights=("hf:google/vivit-b-16x2-kinetics400", "hf:google/vivit-b-16x2"),
    layouts=(VIVIT,),
)
def vivit_b() -> ViViTConfig:
    """ViViT-B/16x2, trained on 32 frames of 224 pixels between -1 and 1."""
    return ViViTConfig()
