"""torchvision's video ResNets (R3D, MC3, R(2+1)D): arXiv 1711.11248.

A block computes ``relu(x + F(x))``. As in Re2TAL's SlowFast the ReLU moves into the branch.
"""

from torch import nn
from torchvision.models.video.resnet import BasicBlock, BasicStem, Bottleneck, R2Plus1dStem

from re2tal.reversible.branches import Branch, ChangesShapeError, branches, recomputed
from re2tal.reversible.layouts import BySample


@branches.register
def _basic(block: BasicBlock) -> list[Branch]:
    return _convolutions(block, (block.conv1, block.conv2))


@branches.register
def _bottleneck(block: Bottleneck) -> list[Branch]:
    return _convolutions(block, (block.conv1, block.conv2, block.conv3))


def _convolutions(block: BasicBlock | Bottleneck, modules: tuple[nn.Module, ...]) -> list[Branch]:
    if block.downsample is not None:
        raise ChangesShapeError(
            f"it has stride {block.stride} and a convolution on its skip connection"
        )
    # All results have the T x H x W of the input, so growth is a ratio of channels.
    convolutions = [m for part in modules for m in part.modules() if isinstance(m, nn.Conv3d)]
    results = sum(2 * convolution.out_channels for convolution in convolutions)  # 2: and its norm
    growth = 3 + results / convolutions[0].in_channels  # 3: the input, the output, a gradient
    return [Branch("convolutions", modules, activation=block.relu, cut=BySample(growth))]


@recomputed.register(BasicStem)
@recomputed.register(R2Plus1dStem)
def _stem(module: nn.Module) -> bool:  # noqa: ARG001
    return True


@recomputed.register(BasicBlock)
@recomputed.register(Bottleneck)
def _between_stages(block: BasicBlock | Bottleneck) -> bool:
    return block.downsample is not None
