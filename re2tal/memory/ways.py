"""Ways to train a backbone, which differ in the tensors kept for the backward pass."""

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
    """Way to train.

    Attributes:
        title: name in tables and figures.
        prepare: change of a model as its library built it.
    """

    title: str
    prepare: Prepare


def residual_blocks(model: nn.Module) -> list[str]:
    """Name the residual blocks of a model, including those that cannot be rewired.

    A block that changes the shape cannot be rewired, but it can be checkpointed.

    Args:
        model: not rewired; it is not changed.
    """
    report = rewire(model)
    unwire(model)
    found = [f"{s.container}.{b}".lstrip(".") for s in report.stages for b in s.blocks]
    unknown = branches.dispatch(object)
    # not from the report's list of modules left out, which groups them
    kinds = {name: type(module) for name, module in model.named_modules() if name not in found}
    return found + [n for n, kind in kinds.items() if branches.dispatch(kind) is not unknown]


class _Checkpoint:
    """Checkpointed ``forward`` of a block; a deepcopy of the model runs the copied block."""

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
"""All ways by name: the unchanged model; a checkpoint around each residual block; rewiring as in
Re2TAL only (float streams, whole branches, stored stems); `rewire` with its defaults, exact to the
bit; and the same with plain floating-point streams."""

KEEPING = tuple(way for way in WAYS if way != FLOAT)
"""Ways that differ in memory; exact and floating-point streams keep the same number of bytes."""


def prepare(model: nn.Module, way: str, *, for_gpu: bool = False) -> nn.Module:
    """Change a model to train in one way.

    Args:
        model: model of another library; it is changed in place and returned.
        way: key of `WAYS`.
        for_gpu: use the piece size of a GPU, whatever the model's device.
    """
    if for_gpu and way == "ours":
        rewire(model, slice_bytes=SMALLEST_PIECE["cuda"])
    else:
        WAYS[way].prepare(model)
    return model


@contextmanager
def prepared(model: nn.Module, change: Prepare) -> Iterator[nn.Module]:
    """Change a model inside the block, and restore it afterwards.

    Args:
        model: model of another library.
        change: `Way.prepare`, or another change that `unwire` undoes.
    """
    change(model)
    try:
        yield model
    finally:
        unwire(model)
        for module in model.modules():
            if isinstance(vars(module).get("forward"), _Checkpoint):
                del vars(module)["forward"]
