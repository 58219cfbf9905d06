"""Image transformers frame by frame: DINOv2, DINOv3, EVA-02, SigLIP and CLIP, timm's own classes.

    arXiv 2304.07193, 2508.10104, 2303.11331, 2303.15343, 2103.00020

Every `every`-th frame is an image. Frames do not interact before the localizer. Parameters have
timm's names, so its files fit; timm is imported only when a model is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from re2tal.backbones.clips import (
    ClipFamily,
    ClipStem,
    TransformerConfig,
    check_shape,
    library,
    patches,
)
from re2tal.backbones.table import Layout, backbone
from re2tal.errors import check_within
from re2tal.weights import Colour

CLIP_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Colour = (0.26862954, 0.26130258, 0.27577711)
HALF: Colour = (0.5, 0.5, 0.5)

Family = Literal["dinov2", "dinov3", "eva02", "siglip", "clip"]
_TITLES: Mapping[Family, str] = {
    "dinov2": "DINOv2",
    "dinov3": "DINOv3",
    "eva02": "EVA-02",
    "siglip": "SigLIP",
    "clip": "CLIP",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """Differences of a family from other vision transformers.

    Attributes:
        kind: timm's class.
        options: arguments of the class that all sizes share.
        epsilon: epsilon of all norms.
        norm_last: true to normalise the mean over places, false to normalise each place.
    """

    kind: Literal["vision_transformer:VisionTransformer", "eva:Eva"] = (
        "vision_transformer:VisionTransformer"
    )
    options: Mapping[str, Any] = field(default_factory=dict)
    epsilon: float = 1e-6
    norm_last: bool = False


_RECORDS: Mapping[Family, _Record] = {
    "dinov2": _Record(options={"init_values": 1e-5}),
    "dinov3": _Record(
        kind="eva:Eva",
        options={
            "init_values": 1e-5,
            "qkv_bias": False,
            "use_abs_pos_emb": False,
            "use_rot_pos_emb": True,
            "rope_type": "dinov3",
            "rope_temperature": 100,
            "rope_rotate_half": True,
        },
        epsilon=1e-5,
    ),
    "eva02": _Record(
        kind="eva:Eva",
        options={
            "qkv_fused": False,
            "swiglu_mlp": True,
            "scale_mlp": True,
            "use_rot_pos_emb": True,
            "ref_feat_shape": (16, 16),  # the grid of its pretraining, 224 pixels
        },
        norm_last=True,
    ),
    "siglip": _Record(options={"class_token": False}),
    "clip": _Record(options={"pre_norm": True, "act_layer": "quick_gelu"}, epsilon=1e-5),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FramesConfig(TransformerConfig):
    """Shape of an image transformer that runs frame by frame.

    Attributes:
        family: family of models, which determines norms, positions and the form of the blocks.
        registers: number of register tokens beside the class token.
        trained_size: side of the images in the pretraining, in pixels; for other sizes, position
            embeddings are resized as in timm. Families with rotary embeddings only (DINOv3) do not
            use it.
        pool: feature of a frame: the mean of its patch tokens, the class token, or SigLIP's
            attention pooling.
        every: run on the middle one of so many frames, such as 4 for a quarter of the frames.
        drop_path: probability of dropping the last block's branches; it grows with depth.
    """

    family: Family = "dinov2"
    patch: int = 14
    registers: int = 0
    trained_size: int = 518
    pool: Literal["mean", "class", "attention"] = "mean"
    every: int = 1
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        check_shape(self)
        check_within(self, registers=(0, 2**10), every=(1, 2**10))
        if "use_rot_pos_emb" in _RECORDS[self.family].options and self.channels % (4 * self.heads):
            raise ValueError(  # two axes, each with a sine and a cosine
                f"FramesConfig.channels of {_TITLES[self.family]} must be a multiple of four times "
                f"the {self.heads} heads, but is {self.channels}."
            )
        pools = ("mean", "attention" if self.family == "siglip" else "class")
        if self.pool not in pools:
            raise ValueError(
                f"FramesConfig.pool must be {' or '.join(pools)} for {_TITLES[self.family]}, but "
                f"is {self.pool!r}."
            )

    @property
    def clip(self) -> int:
        """Frames of a clip, of which one is used."""
        return self.every

    @property
    def token_frames(self) -> int:
        """Frames of a token; see `ClipConfig`."""
        return self.every

    def clip_family(self) -> ClipFamily:
        """Return the record of these models; see `ClipConfig`."""
        return ClipFamily(
            make=_make,
            tokens=partial(_pooled, self),
            block=re.compile(r"blocks\.(\d+)\."),
            stem=("patch_embed.", "cls_token", "reg_token", "pos_embed", "norm_pre."),
        )


class FramePatches(ClipStem):
    """Patch embedding of the selected frames of a window.

    Args:
        proj: convolution of the patches, under timm's name.
        every: number of frames of which the middle one is used.
    """

    def __init__(self, proj: nn.Module, every: int) -> None:
        super().__init__()
        self.proj: Any = proj
        self._every = every

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        side: int = self.proj.kernel_size[0]
        return side

    def forward(self, video: Tensor) -> Tensor:
        """Compute tokens `(B T/every, H', W', C)` of a video `(B, 3, T, H, W)`."""
        seen = video[:, :, self._every // 2 :: self._every]  # the middle of each group
        return patches(self.proj, seen, clip=1)[:, 0]


def _make(config: FramesConfig) -> nn.Module:
    record, title = _RECORDS[config.family], _TITLES[config.family]
    module, _, kind = record.kind.partition(":")
    models = library(f"timm.models.{module}", title)
    registers = {"num_reg_tokens" if kind == "Eva" else "reg_tokens": config.registers}
    model: nn.Module = getattr(models, kind)(
        img_size=config.trained_size,
        patch_size=config.patch,
        embed_dim=config.channels,
        depth=config.depths[0],
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path,
        num_classes=0,
        global_pool="map" if config.pool == "attention" else "",
        dynamic_img_size=True,  # rotary embeddings for the actual frame size
        no_embed_class=config.registers > 0,
        norm_layer=partial(library("timm.layers", title).LayerNorm, eps=record.epsilon),
        **registers,
        **record.options,
    )
    model.patch_embed = FramePatches(model.get_submodule("patch_embed.proj"), config.every)
    return model


def _pooled(config: FramesConfig, parts: Any, video: Tensor) -> Tensor:
    """Compute features `(B T/every, 1, places, C)`; one place unless the mean is taken later."""
    tokens, before = _tokens(config, parts, video)
    feature: Tensor
    if config.pool == "mean":
        places = tokens[:, before:]
        if not _RECORDS[config.family].norm_last:
            normed: Tensor = parts.norm(places)
            return normed[:, None]
        feature = parts.norm(places.mean(dim=1))  # norm of the mean, not mean of norms
    elif config.pool == "class":
        feature = parts.norm(tokens[:, 0])
    else:
        feature = parts.attn_pool(parts.norm(tokens))
    return feature[:, None, None]


def _tokens(config: FramesConfig, parts: Any, video: Tensor) -> tuple[Tensor, int]:
    """Compute the last block's tokens of each frame; also return the number before the patches."""
    places = parts.patch_embed(video)
    grid = tuple(places.shape[1:3])
    tokens = places.flatten(1, 2)
    further = [
        token.expand(len(tokens), -1, -1)
        for name in ("cls_token", "reg_token")
        if (token := getattr(parts, name, None)) is not None
    ]
    before = sum(token.shape[1] for token in further)
    positions = getattr(parts, "pos_embed", None)
    if positions is not None:
        side = config.trained_size // config.patch
        own = positions.shape[1] - side**2  # positions of the tokens before the patches
        positions = library("timm.layers", _TITLES[config.family]).resample_abs_pos_embed(
            positions, new_size=grid, old_size=(side, side), num_prefix_tokens=own
        )
        tokens = tokens + positions[:, own:]
        if own:
            further = [torch.cat(further, dim=1) + positions[:, :own]]
    tokens = parts.norm_pre(torch.cat([*further, tokens], dim=1))
    if not hasattr(parts, "rope"):
        return parts.blocks(tokens), before
    # EVA-02 and DINOv3: every block gets the rotary embeddings of this grid
    rope = parts.rope.get_embed(shape=grid)
    for block in parts.blocks:
        tokens = block(tokens, rope=rope)
    return tokens, before


_KNOWN = re.compile(
    r"cls_token|reg_token|mask_token|pos_embed|(?:patch_embed\.proj|norm_pre|norm)\.(?:weight|bias)"
    r"|blocks\.\d+\.(?:(?:ls[12]\.)?gamma(?:_[12])?|(?:norm[12]|attn\.(?:qkv|[qkv]_proj|proj)"
    r"|mlp\.(?:fc1|fc1_g|fc1_x|fc2|norm))\.(?:weight|bias))"
    r"|attn_pool\.(?:latent|(?:q|kv|proj|norm|mlp\.fc[12])\.(?:weight|bias))"
)


def _renamed(name: str) -> str | None:
    if name.startswith("fc_norm."):  # in models with `norm_last`
        name = name.removeprefix("fc_")
    return name if _KNOWN.fullmatch(name) else None


def _of_another_size(backbone: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    theirs, ours = weights.get("pos_embed"), backbone.state_dict().get("pos_embed")
    stem = getattr(backbone, "patch_embed", None)
    if theirs is None or ours is None or not isinstance(stem, FramePatches):
        return None
    if theirs.ndim != 3 or theirs.shape[1] == ours.shape[1]:
        return None
    for before in (0, 1):
        side = isqrt(theirs.shape[1] - before)
        if side**2 == theirs.shape[1] - before:
            size = side * stem.patch
            return (
                f"their positions are those of images of {size} pixels: set trained_size={size} "
                f"(--model.backbone.trained-size {size}); frames may have any size"
            )
    return None


TIMM = Layout(
    title="image transformer of timm",
    mark=re.compile(r"(?!.*(?:decoder|layers)\.)(|.*\.)blocks\.0\.mlp\.fc1(?:_g)?\.weight"),
    rename=_renamed,
    classifier=re.compile(r"head\.(?:weight|bias)"),
    optional=re.compile(r"attn_pool\..+|mask_token"),
    objection=_of_another_size,
)
_LAYOUTS = (TIMM,)


@backbone(weights=("hf:timm/vit_small_patch14_dinov2.lvd142m",), layouts=_LAYOUTS)
def dinov2_s() -> FramesConfig:
    """DINOv2 ViT-S/14."""
    return FramesConfig(channels=384, heads=6)


@backbone(weights=("hf:timm/vit_base_patch14_dinov2.lvd142m",), layouts=_LAYOUTS)
def dinov2_b() -> FramesConfig:
    """DINOv2 ViT-B/14."""
    return FramesConfig()


@backbone(weights=("hf:timm/vit_large_patch14_dinov2.lvd142m",), layouts=_LAYOUTS)
def dinov2_l() -> FramesConfig:
    """DINOv2 ViT-L/14."""
    return FramesConfig(channels=1024, depths=(24,), heads=16)


@backbone(weights=("hf:timm/vit_small_patch14_reg4_dinov2.lvd142m",), layouts=_LAYOUTS)
def dinov2_reg_s() -> FramesConfig:
    """DINOv2 ViT-S/14 with registers."""
    return replace(dinov2_s(), registers=4)


@backbone(weights=("hf:timm/vit_base_patch14_reg4_dinov2.lvd142m",), layouts=_LAYOUTS)
def dinov2_reg_b() -> FramesConfig:
    """DINOv2 ViT-B/14 with registers."""
    return replace(dinov2_b(), registers=4)


@backbone(weights=("hf:timm/vit_large_patch14_reg4_dinov2.lvd142m",), layouts=_LAYOUTS)
def dinov2_reg_l() -> FramesConfig:
    """DINOv2 ViT-L/14 with registers."""
    return replace(dinov2_l(), registers=4)


@backbone(weights=("hf:timm/vit_small_patch16_dinov3.lvd1689m",), layouts=_LAYOUTS)
def dinov3_s() -> FramesConfig:
    """DINOv3 ViT-S/16."""
    return replace(dinov3_b(), channels=384, heads=6)


@backbone(weights=("hf:timm/vit_base_patch16_dinov3.lvd1689m",), layouts=_LAYOUTS)
def dinov3_b() -> FramesConfig:
    """DINOv3 ViT-B/16."""
    return FramesConfig(family="dinov3", patch=16, registers=4, trained_size=256)


@backbone(weights=("hf:timm/vit_large_patch16_dinov3.lvd1689m",), layouts=_LAYOUTS)
def dinov3_l() -> FramesConfig:
    """DINOv3 ViT-L/16."""
    return replace(dinov3_b(), channels=1024, depths=(24,), heads=16)


@backbone(
    mean=CLIP_MEAN,
    std=CLIP_STD,
    weights=("hf:timm/eva02_base_patch14_224.mim_in22k",),
    layouts=_LAYOUTS,
)
def eva02_b() -> FramesConfig:
    """EVA-02-B/14; finetuned weights (448 pixels) need `trained_size=448`."""
    return FramesConfig(family="eva02", mlp_ratio=8 / 3, trained_size=224)


@backbone(
    mean=CLIP_MEAN,
    std=CLIP_STD,
    weights=("hf:timm/eva02_large_patch14_224.mim_m38m",),
    layouts=_LAYOUTS,
)
def eva02_l() -> FramesConfig:
    """EVA-02-L/14; finetuned weights (448 pixels) need `trained_size=448`."""
    return replace(eva02_b(), channels=1024, depths=(24,), heads=16)


@backbone(
    mean=HALF,
    std=HALF,
    weights=(
        "hf:timm/vit_base_patch16_siglip_224.webli",
        "hf:timm/vit_base_patch16_siglip_224.v2_webli",
    ),
    layouts=_LAYOUTS,
)
def siglip_b() -> FramesConfig:
    """SigLIP ViT-B/16 of 224 pixels, and SigLIP 2 (arXiv 2502.14786)."""
    return FramesConfig(family="siglip", patch=16, trained_size=224)


@backbone(
    mean=HALF,
    std=HALF,
    weights=(
        "hf:timm/vit_large_patch16_siglip_256.webli",
        "hf:timm/vit_large_patch16_siglip_256.v2_webli",
    ),
    layouts=_LAYOUTS,
)
def siglip_l() -> FramesConfig:
    """SigLIP ViT-L/16 of 256 pixels, and SigLIP 2."""
    return replace(siglip_b(), channels=1024, depths=(24,), heads=16, trained_size=256)


@backbone(
    mean=CLIP_MEAN,
    std=CLIP_STD,
    weights=("hf:timm/vit_base_patch16_clip_224.openai",),
    layouts=_LAYOUTS,
)
def clip_b() -> FramesConfig:
    """Image encoder of CLIP ViT-B/16, without its projection to the texts' space."""
    return FramesConfig(family="clip", patch=16, trained_size=224)


@backbone(
    mean=CLIP_MEAN,
    std=CLIP_STD,
    weights=("hf:timm/vit_large_patch14_clip_224.openai",),
    layouts=_LAYOUTS,
)
def clip_l() -> FramesConfig:
    """Image encoder of CLIP ViT-L/14, without its projection to the texts' space."""
    return replace(clip_b(), patch=14, channels=1024, depths=(24,), heads=16)
