"""Tiny whole models of every library whose blocks have a family, and what to call them with."""

from collections.abc import Callable
from typing import Any

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

Built = tuple[nn.Module, tuple[Any, ...]]


def features(output: Any) -> Tensor:
    """The tensor to take a loss of; every parameter of the model has a part in it."""
    if isinstance(output, Tensor):
        return output
    predicted = getattr(output, "predictor_output", None)
    tensor: Tensor = (output if predicted is None else predicted).last_hidden_state
    return tensor


def _swin3d(depth: int = 2, drop: float = 0.0) -> Built:
    return _video_swin(depth, drop), (torch.randn(2, 3, 4, 32, 32),)


def _swin3d_padded(depth: int = 2, drop: float = 0.0) -> Built:
    # 3 x 7 x 6 patches in windows of 2 x 4 x 4
    return _video_swin(depth, drop), (torch.randn(2, 3, 6, 28, 24),)


def _video_swin(depth: int, drop: float) -> nn.Module:
    return SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=8,
        depths=[depth, depth],
        num_heads=[2, 2],
        window_size=[2, 4, 4],
        dropout=drop,
        attention_dropout=drop,
        stochastic_depth_prob=drop,
        num_classes=3,
    )


def _swin2d(depth: int = 2, drop: float = 0.0) -> Built:
    model = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[depth, depth],
        num_heads=[2, 2],
        window_size=[4, 4],
        dropout=drop,
        attention_dropout=drop,
        stochastic_depth_prob=drop,
        num_classes=3,
    )
    return model, (torch.randn(2, 3, 32, 32),)


def _mvit(depth: int, drop: float, *, second: bool) -> Built:
    """Two resolutions; version 1 projects in the block before the pooling, version 2 with it."""
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


def _mvit_v1(depth: int = 2, drop: float = 0.0) -> Built:
    return _mvit(depth, drop, second=False)


def _mvit_v2(depth: int = 2, drop: float = 0.0) -> Built:
    return _mvit(depth, drop, second=True)


def _video_resnet(makers: list[type[nn.Module]], stem: type[nn.Module], depth: int) -> Built:
    model = VideoResNet(BasicBlock, makers, [depth, depth + 1, 1, 1], stem, num_classes=3)
    # The widths are the library's own, and only those of the first two stages are small.
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 3)
    return model, (torch.randn(2, 3, 4, 16, 16),)


def _r3d(depth: int = 2, drop: float = 0.0) -> Built:
    return _video_resnet([Conv3DSimple] * 4, BasicStem, depth)


def _mc3(depth: int = 2, drop: float = 0.0) -> Built:
    return _video_resnet([Conv3DSimple] + [Conv3DNoTemporal] * 3, BasicStem, depth)


def _r2plus1d(depth: int = 2, drop: float = 0.0) -> Built:
    return _video_resnet([Conv2Plus1D] * 4, R2Plus1dStem, depth)


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
    nn.init.normal_(model.heads.head.weight)  # zero at first, which would stop all gradients
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


def _timesformer(depth: int, drop: float, *, attention: str) -> Built:
    from transformers import TimesformerConfig, TimesformerModel
    from transformers.models.timesformer.modeling_timesformer import TimesformerDropPath

    config = TimesformerConfig(patch_size=4, attention_type=attention, **_shape(depth, drop))
    model = TimesformerModel(config)
    for layer in model.encoder.layer:  # the configuration allows whole numbers only
        layer.drop_path = TimesformerDropPath(drop)
    return model, (torch.randn(_CLIP),)


def _timesformer_divided(depth: int = 2, drop: float = 0.0) -> Built:
    return _timesformer(depth, drop, attention="divided_space_time")


def _timesformer_space(depth: int = 2, drop: float = 0.0) -> Built:
    return _timesformer(depth, drop, attention="space_only")


def _timesformer_joint(depth: int = 2, drop: float = 0.0) -> Built:
    return _timesformer(depth, drop, attention="joint_space_time")


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


ZOO: dict[str, Callable[..., Built]] = {
    "swin3d": _swin3d,
    "swin3d_padded": _swin3d_padded,
    "swin2d": _swin2d,
    "mvit_v1": _mvit_v1,
    "mvit_v2": _mvit_v2,
    "r3d": _r3d,
    "mc3": _mc3,
    "r2plus1d": _r2plus1d,
    "vit": _vit,
    "timm_vit": _timm_vit,
    "videomae": _videomae,
    "vivit": _vivit,
    "timesformer_divided": _timesformer_divided,
    "timesformer_space": _timesformer_space,
    "timesformer_joint": _timesformer_joint,
    "vjepa2": _vjepa2,
}
"""Builders ``(depth=2, drop=0.0)``: residual blocks of a stage, and the probability of dropout and,
where the library has it, of stochastic depth. The caller seeds them."""
