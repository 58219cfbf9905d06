"""Four ways to run the same backbone, which differ in what they keep for the backward pass."""

import copy
from collections.abc import Callable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

import re2tal
from re2tal.reversible import branches
from re2tal.reversible.coupling import SMALLEST_PIECE


def plain(backbone: nn.Module) -> None:
    """Every activation is stored."""


def checkpointed(backbone: nn.Module) -> None:
    """Each residual block stores its input, and runs again in the backward."""
    for name in residual_blocks(backbone):
        block = backbone.get_submodule(name)
        again = partial(checkpoint, block.forward, use_reentrant=False)
        vars(block)["forward"] = again


def naive(backbone: nn.Module) -> None:
    """Rewired as other implementations do it: float streams, branches whole, all else stored."""
    re2tal.rewire(backbone, exact=False, slice_bytes=None, recompute=False)


def ours(backbone: nn.Module) -> None:
    """Rewired as on a GPU, wherever the prediction is made."""
    re2tal.rewire(backbone, slice_bytes=SMALLEST_PIECE["cuda"])


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "plain": plain,
    "checkpointed": checkpointed,
    "naive": naive,
    "ours": ours,
}
"""Each changes a backbone in place."""

TITLES = {
    "plain": "plain",
    "checkpointed": "per-block checkpointing",
    "naive": "naive reversible",
    "ours": "ours",
}


def residual_blocks(backbone: nn.Module) -> list[str]:
    """Names of the residual blocks of a backbone: those that can be rewired, and their like.

    A block of the same family that changes the shape cannot be rewired, but checkpointed it can be.

    Args:
        backbone: not rewired; it stays as it is.
    """
    report = re2tal.rewire(copy.deepcopy(backbone))
    found = [f"{s.container}.{block}" for s in report.stages for block in s.blocks]
    unknown = branches.dispatch(object)
    for left in report.left_out:
        kind = type(backbone.get_submodule(left.name))
        if branches.dispatch(kind) is not unknown:
            found.append(left.name)
    return found
