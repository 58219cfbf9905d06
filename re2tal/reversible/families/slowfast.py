"""The residual blocks of `re2tal.backbones.slowfast`.

A block computes ``relu(x + F(x))``. As in Re2TAL's SlowFast (arXiv 2211.14053) the ReLU moves into
the branch.
"""

import torch.nn.functional as F

from re2tal.backbones.slowfast.blocks import Bottleneck, Lateral, Stem
from re2tal.reversible.branches import Branch, BySample, ChangesShapeError, branches, recomputed

_GROWTH = 6.0
"""The input (1), the results of three convolutions and their norms, of which two have a quarter of
its channels (3), and the gradients of the last two (2)."""


@branches.register
def _bottleneck(block: Bottleneck) -> list[Branch]:
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


@recomputed.register
def _stem(module: Stem) -> bool:  # noqa: ARG001
    return True


@recomputed.register
def _lateral(module: Lateral) -> bool:  # noqa: ARG001
    return True
