"""The ways to train one backbone, which differ in what they keep for the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from re2tal.reversible import branches, rewire, unwire
from re2tal.reversible.coupling import SMALLEST_PIECE

PLAIN, FLOAT = "plain", "ours, float"

Prepare = Callable[[nn.Module], object]
"""Change of a model in place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A way to train.

    Attributes:
        title: name in tables and pictures.
        prepare: change that it makes to a model as its library built it.
    """

    title: str
    prepare: Prepare


def residual_blocks(model: nn.Module) -> list[str]:
    """Name the residual blocks of a model: those that can be rewired, and their like.

    A block of the same family that changes the shape cannot be rewired, but checkpointed it can be.

    Args:
        model: not rewired; it stays as it is.
    """
    report = rewire(model)
    unwire(model)
    found = [f"{s.container}.{b}".lstrip(".") for s in report.stages for b in s.blocks]
    unknown = branches.dispatch(object)
    # not by the report of what was left out, which puts modules together
    kinds = {name: type(module) for name, module in model.named_modules() if name not in found}
    return found + [n for n, kind in kinds.items() if branches.dispatch(kind) is not unknown]


class _Checkpoint:
    """The ``forward`` of a block whose activations are recomputed; a copy runs its own block."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __call__(self, *args: Any) -> Any:
        forward = type(self._block).forward
        return checkpoint(forward, self._block, *args, use_reentrant=False)


def _checkpointed(model: nn.Module) -> None:
    for name in residual_blocks(model):
        block = model.get_submodule(name)
        vars(block)["forward"] = _Checkpoint(block)


WAYS: dict[str, Way] = {
    PLAIN: Way(title=PLAIN, prepare=lambda model: model),
    "checkpointed": Way(title="per-block checkpointing", prepare=_checkpointed),
    "naive": Way(
        title="naive reversible",
        prepare=lambda model: rewire(model, exact=False, slice_bytes=None, recompute=False),
    ),
    "ours": Way(title="ours", prepare=rewire),
    FLOAT: Way(title=FLOAT, prepare=lambda model: rewire(model, exact=False)),
}
"""All ways by name: the model as it is; a checkpoint around each residual block; rewiring as in
Re2TAL and no more (float streams, branches whole, stems stored); `rewire` as it comes, exact to the
bit; and the same with plain floating-point streams."""

KEEPING = tuple(way for way in WAYS if way != FLOAT)
"""The ways that differ in memory: on the grid or not, the same bytes are kept."""


def prepare(model: nn.Module, way: str, *, for_gpu: bool = False) -> nn.Module:
    """Have a model train in one way.

    Args:
        model: as its library built it; it is changed in place and returned.
        way: key of `WAYS`.
        for_gpu: rewire to pieces of a GPU's size, wherever the model is.
    """
    if for_gpu and way == "ours":
        rewire(model, slice_bytes=SMALLEST_PIECE["cuda"])
    else:
        WAYS[way].prepare(model)
    return model


@contextmanager
def prepared(model: nn.Module, change: Prepare) -> Iterator[nn.Module]:
    """Train in one way inside the block, and leave the model as it was before it.

    Args:
        model: as its library built it.
        change: `Way.prepare`, or another change that `unwire` takes back.
    """
    change(model)
    try:
        yield model
    finally:
        unwire(model)
        for module in model.modules():
            if isinstance(vars(module).get("forward"), _Checkpoint):
                del vars(module)["forward"]
