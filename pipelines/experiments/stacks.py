"""Stacks of residual blocks of one shape and any depth, of four families."""

from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d
from torchvision.models.vision_transformer import EncoderBlock

from re2tal.reversible import Branch, branches

Stack = tuple[nn.Sequential, Tensor]


class MlpBlock(nn.Module):
    """``x + two(gelu(one(norm(x))))`` for x ``(B, C)``.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.one = nn.Linear(width, 4 * width)
        self.two = nn.Linear(4 * width, width)

    def branch(self, x: Tensor) -> Tensor:
        """What is added to x."""
        return self.two(F.gelu(self.one(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        return x + self.branch(x)


@branches.register
def _mlp(block: MlpBlock) -> list[Branch]:
    return [Branch("mlp", (block.norm, block.one, block.two), block.branch)]


def _mlp_stack(count: int) -> Stack:
    return nn.Sequential(*(MlpBlock(64) for _ in range(count))), torch.randn(64, 64)


def swin_stack(
    count: int, *, width: int = 32, heads: int = 2, grid: Sequence[int] = (4, 8, 8)
) -> Stack:
    """Video Swin's blocks, every other one shifted, and one clip of random tokens.

    Args:
        count: residual branches, an even number.
        width: channels.
        heads: of an attention, whose windows are ``(2, 4, 4)``.
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
"""A stack with so many residual branches (an even number), and an input; weights are random."""


def stack(family: str, count: int) -> Stack:
    """A stack and an input; the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return STACKS[family](count)
