"""Networks of the experiments: whole models, and stacks of residual blocks of any depth."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.models.video import SwinTransformer3d, r3d_18, swin3d_t
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d
from torchvision.models.vision_transformer import EncoderBlock

from pipelines.training.workload import Workload
from re2tal.backbones.slowfast import SlowFastConfig, slowfast_50, slowfast_101
from re2tal.backbones.slowfast.blocks import Bottleneck
from re2tal.reversible import Branch, branches


def _slowfast(config: SlowFastConfig) -> nn.Module:
    """Make a SlowFast whose branches are as small as those of a trained network.

    Its norms keep their initial statistics, which do not normalize the outputs of random weights.
    Every branch would then multiply the streams by 1.3, and the 22 blocks of a stage by 500.
    """
    model = config.build()
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.conv3.bn.weight, 0.1)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "swin3d_t": swin3d_t,
    "swin3d_t with 12 blocks in stage 3": partial(
        SwinTransformer3d,
        patch_size=[2, 4, 4],
        embed_dim=96,
        depths=[2, 2, 12, 2],
        num_heads=[3, 6, 12, 24],
        window_size=[8, 7, 7],
        stochastic_depth_prob=0.1,
    ),
    "slowfast_50": lambda: _slowfast(slowfast_50()),
    "slowfast_101": lambda: _slowfast(slowfast_101()),
    "r3d_18": r3d_18,
    "toy_swin": partial(
        SwinTransformer3d,
        patch_size=[2, 4, 4],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=[2, 4, 4],
        num_classes=3,
    ),
}


def build(name: str) -> nn.Module:
    """Make a model of `MODELS` in training mode, with the same random weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().train()


SMALL = Workload(frames=32, size=112)
"""Step of `swin3d_t` that takes two CPU cores seconds."""

LONG = Workload(frames=768, size=224, precision="bfloat16")
"""Step of Re2TAL's end-to-end training, whose memory can be predicted on any machine."""

Stack = tuple[nn.Sequential, Tensor]


class MlpBlock(nn.Module):
    """``x + two(gelu(one(norm(x))))`` for x ``(B, width)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.one = nn.Linear(width, 4 * width)
        self.two = nn.Linear(4 * width, width)

    def branch(self, x: Tensor) -> Tensor:
        """Compute the residual that is added to x."""
        change: Tensor = self.two(F.gelu(self.one(self.norm(x))))
        return change

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual to x."""
        return x + self.branch(x)


@branches.register
def _mlp(block: MlpBlock) -> list[Branch]:
    return [Branch("mlp", (block.norm, block.one, block.two), block.branch)]


def _mlp_stack(count: int) -> Stack:
    return nn.Sequential(*(MlpBlock(64) for _ in range(count))), torch.randn(64, 64)


def swin_stack(
    count: int, *, width: int = 32, heads: int = 2, grid: Sequence[int] = (4, 8, 8)
) -> Stack:
    """Make a stack of Video Swin's blocks, every other one shifted, and one clip of random tokens.

    Args:
        count: even number of residual branches.
        width: number of channels.
        heads: number of heads of an attention, whose windows are ``(2, 4, 4)``.
        grid: tokens in time, height and width.
    """
    shifts = islice(cycle(([0, 0, 0], [1, 2, 2])), count // 2)
    blocks = (
        SwinTransformerBlock(
            dim=width,
            num_heads=heads,
            window_size=[2, 4, 4],
            shift_size=shift,
            attn_layer=ShiftedWindowAttention3d,
        )
        for shift in shifts
    )
    return nn.Sequential(*blocks), torch.randn(1, *grid, width)


def _vit_stack(count: int) -> Stack:
    blocks = (
        EncoderBlock(num_heads=2, hidden_dim=32, mlp_dim=128, dropout=0.0, attention_dropout=0.0)
        for _ in range(count // 2)
    )
    return nn.Sequential(*blocks), torch.randn(4, 32, 32)


def _resnet_stack(count: int) -> Stack:
    blocks = (BasicBlock(16, 16, Conv3DSimple) for _ in range(count))
    return nn.Sequential(*blocks), torch.randn(2, 16, 4, 8, 8)


STACKS: dict[str, Callable[[int], Stack]] = {
    "LayerNorm-MLP": _mlp_stack,
    "Video Swin": swin_stack,
    "ViT": _vit_stack,
    "R3D": _resnet_stack,
}
"""Functions from an even number of residual branches to a stack (random weights) and an input."""


def stack(family: str, count: int) -> Stack:
    """Make a stack and an input, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return STACKS[family](count)
