"""The ways to train one model that are compared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from re2tal.reversible import rewire, unwire

Prepare = Callable[[nn.Module], object]

REFERENCE = "plain"
"""Of which the others are fractions: the model as its library made it."""


def _checkpointed(model: nn.Module) -> None:
    """Give every residual block, also those that change the shape, a checkpoint of its own."""
    kinds = _kinds_of_blocks(model)
    for module in model.modules():
        if type(module) in kinds:
            vars(module)["forward"] = _Checkpoint(module)


def _kinds_of_blocks(model: nn.Module) -> set[type[nn.Module]]:
    """Classes of the blocks that `rewire` would make reversible."""
    stages = rewire(model).stages
    unwire(model)
    return {
        type(model.get_submodule(stage.container).get_submodule(block))
        for stage in stages
        for block in stage.blocks
    }


class _Checkpoint:
    """The ``forward`` of a block whose activations are recomputed."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __call__(self, *args: Any) -> Any:
        forward = type(self._block).forward
        return checkpoint(forward, self._block, *args, use_reentrant=False)


VARIANTS: dict[str, Prepare] = {
    REFERENCE: lambda model: model,
    "checkpoint": _checkpointed,
    "naive": lambda model: rewire(model, exact=False, slice_bytes=None, recompute=False),
    "ours": rewire,
    "ours, float": lambda model: rewire(model, exact=False),
}
"""What is done to a model before it is trained.

"checkpoint" is one `torch.utils.checkpoint` a block. "naive" is rewiring and nothing else, as in
Re2TAL: branches run whole, stems and down-sampling layers store their activations. "ours" is
`rewire` as it comes, bit-exact; "ours, float" the same with plain floating-point streams.
"""


@contextmanager
def prepared(model: nn.Module, prepare: Prepare) -> Iterator[nn.Module]:
    """A model that trains in one way inside the block, and is as it was after it."""
    prepare(model)
    try:
        yield model
    finally:
        unwire(model)
        for module in model.modules():
            if isinstance(vars(module).get("forward"), _Checkpoint):
                del vars(module)["forward"]
