"""Backbones of three libraries, rewired: 49 kinds, each in a small configuration."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, ...]]

_IMAGE, _CLIP = (2, 3, 32, 32), (2, 3, 4, 32, 32)


def _torchvision(name: str, shape: Sequence[int] = _IMAGE, **options: Any) -> Built:
    module = import_module("torchvision.models")
    model = module.get_model(name, weights=None, num_classes=3, **options)
    return model, (torch.randn(*shape),)


def _timm(name: str, shape: Sequence[int] = _IMAGE, **options: Any) -> Built:
    model = import_module("timm").create_model(name, num_classes=3, **options)
    return model, (torch.randn(*shape),)


def _small(depth: int = 3, width: int = 48, **others: Any) -> dict[str, Any]:
    return {"img_size": 32, "embed_dim": width, "depth": depth, "num_heads": 3, **others}


def _transformers(
    name: str, shape: Sequence[int] = _IMAGE, more: dict[str, Any] | None = None, **options: Any
) -> Built:
    library = import_module("transformers")
    model = getattr(library, f"{name}Model")(getattr(library, f"{name}Config")(**options), **(more or {}))
    return model, (torch.randn(*shape),)


def _encoder(width: int = 48, layers: int = 3, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "intermediate_size": 2 * width,
        "image_size": 32,
        "patch_size": 8,
        **others,
    }


_FRAMES = (2, 4, 3, 32, 32)
_WINDOWS: dict[str, Any] = {
    "image_size": 64,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}


KINDS: dict[str, dict[str, Callable[[], Built]]] = {
    "torchvision": {
        "swin3d_t": partial(_torchvision, "swin3d_t", _CLIP),
        "mvit_v1_b": partial(_torchvision, "mvit_v1_b", (1, 3, 16, 224, 224)),
        "mvit_v2_s": partial(_torchvision, "mvit_v2_s", (1, 3, 16, 224, 224)),
        "r3d_18": partial(_torchvision, "r3d_18", (2, 3, 4, 24, 24)),
        "mc3_18": partial(_torchvision, "mc3_18", (2, 3, 4, 24, 24)),
        "r2plus1d_18": partial(_torchvision, "r2plus1d_18", (2, 3, 4, 24, 24)),
        "s3d": partial(_torchvision, "s3d", (1, 3, 16, 224, 224)),
        "swin_t": partial(_torchvision, "swin_t"),
        "swin_v2_t": partial(_torchvision, "swin_v2_t"),
        "maxvit_t": partial(_torchvision, "maxvit_t", (2, 3, 224, 224)),
        "vit_b_16": partial(_torchvision, "vit_b_16", image_size=32),
        "resnet50": partial(_torchvision, "resnet50"),
        "convnext_tiny": partial(_torchvision, "convnext_tiny"),
        "regnet_y_400mf": partial(_torchvision, "regnet_y_400mf"),
        "efficientnet_b0": partial(_torchvision, "efficientnet_b0"),
        "mobilenet_v3_small": partial(_torchvision, "mobilenet_v3_small"),
    },
    "timm": {
        "vit": partial(_timm, "vit_small_patch16_224", **_small()),
        "deit3": partial(_timm, "deit3_small_patch16_224", **_small()),
        "dinov2": partial(_timm, "vit_small_patch14_dinov2", (2, 3, 28, 28), **_small(img_size=28)),
        "dinov3": partial(_timm, "vit_small_patch16_dinov3", **_small()),
        "eva02": partial(_timm, "eva02_tiny_patch14_224", (2, 3, 28, 28), **_small(img_size=28)),
        "beit": partial(_timm, "beit_base_patch16_224", **_small()),
        "cait": partial(_timm, "cait_xxs24_224", **_small()),
        "xcit": partial(_timm, "xcit_nano_12_p16_224", **_small()),
        "mixer": partial(_timm, "mixer_s16_224", img_size=32, num_blocks=3, embed_dim=48),
        "swin": partial(_timm, "swin_tiny_patch4_window7_224", (2, 3, 56, 56), img_size=56, embed_dim=24),
        "swinv2": partial(_timm, "swinv2_tiny_window8_256", (2, 3, 64, 64), img_size=64, embed_dim=24),
        "hiera": partial(_timm, "hiera_tiny_224", (2, 3, 64, 64), img_size=64),
        "mvitv2": partial(_timm, "mvitv2_tiny", (2, 3, 64, 64), img_size=64),
        "davit": partial(_timm, "davit_tiny", (2, 3, 64, 64)),
        "caformer": partial(_timm, "caformer_s18", (2, 3, 64, 64), dims=(16, 24, 32, 48)),
        "convnextv2": partial(_timm, "convnextv2_atto"),
        "resnet50": partial(_timm, "resnet50"),
        "nfnet": partial(_timm, "dm_nfnet_f0", (2, 3, 64, 64)),
    },
    "transformers": {
        "VideoMAE": partial(_transformers, "VideoMAE", _FRAMES, **_encoder(num_frames=4)),
        "ViViT": partial(_transformers, "Vivit", _FRAMES, {"add_pooling_layer": False}, **_encoder(num_frames=4, tubelet_size=[2, 8, 8])),
        "TimeSformer": partial(_transformers, "Timesformer", _FRAMES, **_encoder(num_frames=4)),
        "V-JEPA 2": partial(
            _transformers,
            "VJEPA2",
            _FRAMES,
            crop_size=32,
            patch_size=8,
            frames_per_clip=4,
            hidden_size=48,
            num_attention_heads=2,
            num_hidden_layers=3,
            mlp_ratio=2.0,
            pred_hidden_size=24,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=2,
            pred_mlp_ratio=2.0,
        ),
        "ViT": partial(_transformers, "ViT", more={"add_pooling_layer": False}, **_encoder()),
        "DeiT": partial(_transformers, "DeiT", more={"add_pooling_layer": False}, **_encoder()),
        "DINOv2": partial(_transformers, "Dinov2", **_encoder(mlp_ratio=2)),
        "DINOv3": partial(_transformers, "DINOv3ViT", **_encoder()),
        "CLIP": partial(_transformers, "CLIPVision", **_encoder()),
        "SigLIP": partial(_transformers, "SiglipVision", **_encoder()),
        "BEiT": partial(_transformers, "Beit", more={"add_pooling_layer": False}, **_encoder(use_relative_position_bias=True)),
        "Swin": partial(_transformers, "Swin", (2, 3, 64, 64), more={"add_pooling_layer": False}, **_WINDOWS),
        "Swin v2": partial(_transformers, "Swinv2", (2, 3, 64, 64), more={"add_pooling_layer": False}, **_WINDOWS),
        "ConvNeXt": partial(_transformers, "ConvNext", hidden_sizes=[16, 24, 32, 48], depths=[2, 2, 3, 2]),
        "Hiera": partial(_transformers, "Hiera", (2, 3, 64, 64), more={"add_pooling_layer": False}, image_size=[64, 64], embed_dim=24, depths=[1, 2, 3, 2]),
    },
}  # fmt: skip
"""Functions that make a model, and what to call it with, by library and kind."""
