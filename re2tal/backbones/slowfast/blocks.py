"""Blocks of a SlowFast, and their split into branches for `re2tal.rewire`.

Submodules are named as in mmaction2's weights. Convolutions have no bias, because a BatchNorm
follows. ReLUs work in place, always on the new result of a BatchNorm or a sum.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.reversible.branches import Branch, ChangesShapeError, branches, recomputed
from re2tal.reversible.layouts import BySample

EXPANSION = 4
"""Ratio of a bottleneck's output channels to its inner channels."""


class ConvNorm(nn.Module):
    """Convolution and BatchNorm, with an optional stride in height and width.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: frames, height and width of the kernel, all odd.
        stride: stride in height and width.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int, int], stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = _conv(inputs, outputs, kernel, (1, stride, stride))
        self.bn = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, inputs, T, H, W)` to `(B, outputs, T, H / stride, W / stride)`, rounded up."""
        out: Tensor = self.bn(self.conv(x))
        return out


class Stem(nn.Module):
    """Convolution, BatchNorm, ReLU and max pooling, which divide height and width by 4.

    Args:
        outputs: output channels.
        frames: frames that the kernel covers, odd.
    """

    def __init__(self, outputs: int, frames: int) -> None:
        super().__init__()
        self.conv = _conv(3, outputs, (frames, 7, 7), (1, 2, 2))
        self.bn = nn.BatchNorm3d(outputs)

    def forward(self, video: Tensor) -> Tensor:
        """Map `(B, 3, T, H, W)` to `(B, outputs, T, H / 4, W / 4)`, rounded up."""
        x = F.relu(self.bn(self.conv(video)), inplace=True)
        return F.max_pool3d(x, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))


class Lateral(nn.Module):
    """Connection from the fast pathway to the slow one: a convolution with a stride in time.

    This is the "time-strided convolution" of section 3.3, which doubles the channels.

    Args:
        inputs: channels of the fast pathway.
        frames: frames that the kernel covers, odd.
        stride: frames of the fast pathway per frame of the slow one.
        norm: true to add a BatchNorm and a ReLU.
    """

    def __init__(self, inputs: int, *, frames: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv = _conv(inputs, 2 * inputs, (frames, 1, 1), (stride, 1, 1))
        self.bn = nn.BatchNorm3d(2 * inputs) if norm else None

    def forward(self, fast: Tensor) -> Tensor:
        """Map `(B, inputs, T, H, W)` to `(B, 2 inputs, T / stride, H, W)`, rounded up."""
        x: Tensor = self.conv(fast)
        return x if self.bn is None else F.relu(self.bn(x), inplace=True)


class Bottleneck(nn.Module):
    """Residual block, `relu(skip(x) + F(x))`.

    `F` is a convolution in time, one in space, and one that widens. The skip connection is the
    identity if the shape stays the same, and otherwise a convolution.

    Args:
        inputs: input channels.
        inner: channels of the first two convolutions; the block has four times as many outputs.
        frames: temporal kernel size of the first convolution: 3, or 1 for a purely spatial block.
        stride: stride in height and width, in the second convolution.
        relu_before_sum: true to compute `skip(x) + relu(F(x))` instead.
    """

    def __init__(
        self,
        inputs: int,
        inner: int,
        *,
        frames: int,
        stride: int = 1,
        relu_before_sum: bool = False,
    ) -> None:
        super().__init__()
        self.relu_before_sum = relu_before_sum
        outputs = EXPANSION * inner
        self.conv1 = ConvNorm(inputs, inner, (frames, 1, 1))
        self.conv2 = ConvNorm(inner, inner, (1, 3, 3), stride)
        self.conv3 = ConvNorm(inner, outputs, (1, 1, 1))
        same = inputs == outputs and stride == 1
        self.downsample = None if same else ConvNorm(inputs, outputs, (1, 1, 1), stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, inputs, T, H, W)` to `(B, 4 inner, T, H / stride, W / stride)`, rounded up."""
        skip = x if self.downsample is None else self.downsample(x)
        if self.relu_before_sum:
            return skip + F.relu(self.residual(x), inplace=True)
        return F.relu(skip + self.residual(x), inplace=True)

    def residual(self, x: Tensor) -> Tensor:
        """Compute `F(x)`, a new tensor."""
        x = F.relu(self.conv1(x), inplace=True)
        x = F.relu(self.conv2(x), inplace=True)
        out: Tensor = self.conv3(x)
        return out


def stage(
    inputs: int, inner: int, *, depth: int, frames: int, stride: int, relu_before_sum: bool
) -> nn.Sequential:
    """Chain `depth` blocks; only the first changes the shape and gets `stride`, `relu_before_sum`.

    See `Bottleneck` for the other arguments.
    """
    first = Bottleneck(inputs, inner, frames=frames, stride=stride, relu_before_sum=relu_before_sum)
    others = (Bottleneck(EXPANSION * inner, inner, frames=frames) for _ in range(depth - 1))
    return nn.Sequential(first, *others)


def _conv(
    inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> nn.Conv3d:
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    conv = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


_GROWTH = 6.0
"""Elements in memory per input element: the input (1), the results of three convolutions and their
norms, two of them with a quarter of the channels (3), and the gradients of the last two (2)."""


def _branches(block: Bottleneck) -> list[Branch]:
    """Split a block as in Re2TAL (arXiv 2211.14053): the ReLU after the sum joins the branch."""
    if block.downsample is not None:
        inner, inputs = block.conv1.conv, block.downsample.conv
        raise ChangesShapeError(
            f"it turns {inner.in_channels} channels into {inputs.out_channels}, with stride "
            f"{inputs.stride[1]}"
        )
    return [
        Branch(
            "residual",
            (block.conv1, block.conv2, block.conv3),
            function=block.residual,
            activation=F.relu,
            cut=BySample(_GROWTH),
        )
    ]


def _always(module: nn.Module) -> bool:  # noqa: ARG001
    return True


branches.register(Bottleneck, _branches)
recomputed.register(Stem, _always)
recomputed.register(Lateral, _always)
