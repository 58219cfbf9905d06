"""Tiny whole models of every library whose blocks have a family, with their inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.resnet import (
    BasicBlock,
    BasicStem,
    Conv2Plus1D,
    Conv3DNoTemporal,
    Conv3DSimple,
    R2Plus1dStem,
    VideoResNet,
)
from torchvision.models.video.swin_transformer import SwinTransformer3d
from torchvision.models.vision_transformer import VisionTransformer

from re2tal.backbones.internvideo2 import InternVideo2Config
from re2tal.backbones.slowfast import SlowFastConfig

Built = tuple[nn.Module, tuple[Any, ...]]


def features(output: Any) -> Tensor:
    """Return a tensor on which every parameter of the model has an influence, for a loss."""
    if isinstance(output, Tensor):
        return output
    predicted = getattr(output, "predictor_output", None)
    tensor: Tensor = (output if predicted is None else predicted).last_hidden_state
    return tensor


def _swin(depth: int = 2, drop: float = 0.0, *, size: tuple[int, ...] = (4, 32, 32)) -> Built:
    """Video Swin, or Swin for images; sizes may need padding to windows."""
    spatial = len(size) == 2
    model = (SwinTransformer if spatial else SwinTransformer3d)(
        patch_size=[2, 4, 4][spatial:],
        embed_dim=8,
        depths=[depth, depth],
        num_heads=[2, 2],
        window_size=[4, 4] if spatial else [2, 4, 4],
        dropout=drop,
        attention_dropout=drop,
        stochastic_depth_prob=drop,
        num_classes=3,
    )
    return model, (torch.randn(2, 3, *size),)


def _mvit(depth: int = 2, drop: float = 0.0, *, second: bool) -> Built:
    """Two resolutions. Version 1 projects in the block before the pooling, version 2 with it."""
    width, wide = 16, 32
    kernel, whole = [3, 3, 3], [1, 1, 1]
    keys = [1, 2, 2]

    def config(channels: int, out: int, stride_q: list[int]) -> MSBlockConfig:
        pools_queries = second or stride_q != whole
        return MSBlockConfig(
            num_heads=2,
            input_channels=channels,
            output_channels=out,
            kernel_q=kernel if pools_queries else [],
            kernel_kv=kernel,
            stride_q=stride_q if pools_queries else [],
            stride_kv=keys,
        )

    fine = [config(width, width, whole)] * depth
    if second:
        between = [config(width, wide, keys)]
    else:
        between = [config(width, wide, whole), config(wide, wide, keys)]
    model = MViT(
        spatial_size=(16, 16),
        temporal_size=4,
        block_setting=[*fine, *between, *([config(wide, wide, whole)] * depth)],
        residual_pool=second,
        residual_with_cls_embed=not second,
        rel_pos_embed=second,
        proj_after_attn=second,
        dropout=drop,
        attention_dropout=drop,
        stochastic_depth_prob=drop,
        num_classes=3,
        patch_embed_kernel=(3, 5, 5),
        patch_embed_stride=(2, 4, 4),
        patch_embed_padding=(1, 2, 2),
    )
    return model, (torch.randn(2, 3, 4, 16, 16),)


def _video_resnet(
    depth: int = 2, drop: float = 0.0, *, makers: list[type[nn.Module]], stem: type[nn.Module]
) -> Built:
    model = VideoResNet(BasicBlock, makers, [depth, depth + 1, 1, 1], stem, num_classes=3)
    # The widths are fixed by the library, and only those of the first two stages are small.
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 3)
    return model, (torch.randn(2, 3, 4, 16, 16),)


def _vit(depth: int = 2, drop: float = 0.0) -> Built:
    model = VisionTransformer(
        image_size=16,
        patch_size=4,
        num_layers=depth,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        dropout=drop,
        attention_dropout=drop,
        num_classes=3,
    )
    nn.init.normal_(model.heads.head.weight)  # initialised to zero, which would stop all gradients
    return model, (torch.randn(2, 3, 16, 16),)


def _timm_vit(depth: int = 2, drop: float = 0.0) -> Built:
    from timm.models.vision_transformer import VisionTransformer as TimmTransformer

    model = TimmTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=depth,
        num_heads=2,
        num_classes=3,
        init_values=0.5,
        drop_rate=drop,
        proj_drop_rate=drop,
        attn_drop_rate=drop,
        drop_path_rate=drop,
    )
    return model, (torch.randn(2, 3, 16, 16),)


_CLIP = (2, 4, 3, 16, 16)  # transformers: (B, T, 3, H, W)


def _shape(depth: int, drop: float) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "hidden_dropout_prob": drop,
        "attention_probs_dropout_prob": drop,
        "image_size": 16,
        "num_frames": 4,
    }


def _videomae(depth: int = 2, drop: float = 0.0) -> Built:
    from transformers import VideoMAEConfig, VideoMAEModel

    return VideoMAEModel(VideoMAEConfig(patch_size=4, **_shape(depth, drop))), (torch.randn(_CLIP),)


def _vivit(depth: int = 2, drop: float = 0.0) -> Built:
    from transformers import VivitConfig, VivitModel

    config = VivitConfig(tubelet_size=[2, 4, 4], **_shape(depth, drop))
    return VivitModel(config, add_pooling_layer=False), (torch.randn(_CLIP),)


def _timesformer(depth: int = 2, drop: float = 0.0, *, attention: str) -> Built:
    from transformers import TimesformerConfig, TimesformerModel
    from transformers.models.timesformer.modeling_timesformer import TimesformerDropPath

    config = TimesformerConfig(patch_size=4, attention_type=attention, **_shape(depth, drop))
    model = TimesformerModel(config)
    for layer in model.encoder.layer:  # the configuration allows whole numbers only
        layer.drop_path = TimesformerDropPath(drop)
    return model, (torch.randn(_CLIP),)


def _vjepa2(depth: int = 2, drop: float = 0.0) -> Built:
    from transformers import VJEPA2Config, VJEPA2Model

    config = VJEPA2Config(
        patch_size=4,
        crop_size=16,
        frames_per_clip=4,
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=depth,
        mlp_ratio=2.0,
        drop_path_rate=drop,
        attention_probs_dropout_prob=drop,
        pred_hidden_size=12,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=depth,
        pred_mlp_ratio=2.0,
    )
    return VJEPA2Model(config), (torch.randn(_CLIP),)


def _slowfast(depth: int = 2, drop: float = 0.0, *, coupled: bool = False) -> Built:
    """The project's SlowFast; `coupled` as OpenTAD's: frozen statistics and the ReLU inside."""
    config = SlowFastConfig(
        depths=(depth + 1, 2),
        width=8,
        channel_ratio=4,
        frozen_statistics=coupled,
        relu_before_sum=coupled,
    )
    return config.build(), (torch.randn(2, 3, 8, 32, 32),)


def _internvideo2(depth: int = 2, drop: float = 0.0) -> Built:
    """The project's own model, which has no dropout."""
    config = InternVideo2Config(
        patch=4, channels=16, depths=(depth,), heads=2, mlp_ratio=2.0, clip=4, trained_size=16
    )
    model = config.build()
    return scrambled(model), (torch.randn(2, 3, 8, 16, 16),)


ZOO: dict[str, Callable[..., Built]] = {
    "swin3d": _swin,
    "swin3d_padded": partial(_swin, size=(6, 28, 24)),  # 3 x 7 x 6 patches, 2 x 4 x 4 windows
    "swin2d": partial(_swin, size=(32, 32)),
    "mvit_v1": partial(_mvit, second=False),
    "mvit_v2": partial(_mvit, second=True),
    "r3d": partial(_video_resnet, makers=[Conv3DSimple] * 4, stem=BasicStem),
    "mc3": partial(_video_resnet, makers=[Conv3DSimple] + [Conv3DNoTemporal] * 3, stem=BasicStem),
    "r2plus1d": partial(_video_resnet, makers=[Conv2Plus1D] * 4, stem=R2Plus1dStem),
    "slowfast": _slowfast,
    "slowfast_coupled": partial(_slowfast, coupled=True),
    "vit": _vit,
    "timm_vit": _timm_vit,
    "videomae": _videomae,
    "vivit": _vivit,
    "timesformer_divided": partial(_timesformer, attention="divided_space_time"),
    "timesformer_space": partial(_timesformer, attention="space_only"),
    "timesformer_joint": partial(_timesformer, attention="joint_space_time"),
    "vjepa2": _vjepa2,
    "internvideo2": _internvideo2,
}
"""Builders ``(depth=2, drop=0.0)`` of models: number of residual blocks of a stage, and probability
of dropout and, where the library has it, of stochastic depth. The caller sets the seed."""

every_model = pytest.mark.parametrize("name", ZOO)
both_precisions = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])


class Precision(nn.Module):
    """Model that calls another, under autocast if asked, and returns the tensor for the loss."""

    def __init__(self, inner: nn.Module, *, bf16: bool) -> None:
        super().__init__()
        self.inner = inner
        self.bf16 = bf16

    def forward(self, *inputs: Tensor) -> Tensor:
        device = inputs[0].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            return features(self.inner(*inputs))


def built(
    name: str, *, bf16: bool, depth: int = 2, drop: float = 0.2, device: str = "cpu"
) -> Built:
    """Build a model of the zoo in training mode, and its inputs, which need gradients."""
    torch.manual_seed(0)
    model, inputs = ZOO[name](depth=depth, drop=drop)
    leaves = tuple(x.to(device).requires_grad_() for x in inputs)
    return Precision(model.to(device).train(), bf16=bf16), leaves


def scrambled(model: nn.Module) -> nn.Module:
    """Move parameters away from 0 and 1, values at which an omission would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(
                0.1, 0.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.3
            )
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm3d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model
