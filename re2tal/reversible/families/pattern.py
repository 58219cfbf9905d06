"""Blocks of classes without a registered family: branches from a recording of their forward.

`proof.py` finds and proves the branches once per structure. This file makes `Branch` objects from
them in every forward.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_unflatten

from re2tal.reversible.branches import Branch
from re2tal.reversible.families.proof import (
    Plan,
    activation_of,
    differentiable_kernels,
    plan_of,
    title_of,
)
from re2tal.reversible.families.recording import (
    Own,
    Value,
    fake_mode,
    fake_of,
    own_tensor,
    tensors_of,
)
from re2tal.reversible.families.residual import Residual
from re2tal.reversible.families.vit import has_rows
from re2tal.reversible.layouts import Cut, Layout, Samples, Tokens, Whole
from re2tal.reversible.replay import uncached

_LOG = logging.getLogger(__name__)


def split(block: nn.Module) -> list[Branch]:
    """List the branches of a block of a class without a family.

    Raises:
        NotReversibleError: if the block is not proved to be a chain of residual branches.
    """
    plan = plan_of(block)
    return [_branch(plan, block, place) for place in range(len(plan.cuts))]


def returned(block: nn.Module, y: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wrap the result ``y`` as the block's ``forward`` would return it."""
    recording = plan_of(block).forms(block, y, args, kwargs)[0]
    inputs = tensors_of(y, args, kwargs)

    def of(leaf: Any) -> Any:
        if isinstance(leaf, Own):
            return own_tensor(block, leaf.name)
        if not isinstance(leaf, Value):
            return leaf
        # Arguments that the block returns are passed through; the stream, input 0, becomes y.
        number = recording.original(leaf).number
        return inputs[number] if 0 < number < recording.inputs else y

    return tree_unflatten(map(of, recording.output), recording.structure)


def _branch(plan: Plan, block: nn.Module, place: int) -> Branch:
    _, found = plan.proved[block.training]
    residual = found[place]

    def function(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        recording, branches = plan.forms(block, x, args, kwargs)
        with differentiable_kernels(block):
            return branches[place].run(recording, block, tensors_of(x, args, kwargs))

    modules = [block.get_submodule(name) for name in residual.modules]
    held = _Held(block, residual.tensors)
    return Branch(
        title_of(block, residual),
        (*modules, *([held] if residual.tensors else [])),
        function,
        activation=activation_of(block, residual),
        drop_path=None if residual.drop_path is None else block.get_submodule(residual.drop_path),
        cut=_cut(plan, block, place, function),
    )


class _Held(nn.Module):
    """Module that holds the tensors which a branch uses without calling the modules they are in."""

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.training = block.training
        for name in names:
            tensor = own_tensor(block, name)
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name.replace(".", "_"), tensor)
            else:
                self.register_buffer(name.replace(".", "_"), tensor)


@dataclass(frozen=True, slots=True)
class _OnTokens(Tokens):
    """Layout of tokens for a recorded branch, which is run on ``(tokens, C)`` with nothing else."""

    residual: Residual
    block: nn.Module

    def run(
        self,
        branch: Any,  # noqa: ARG002
        piece: Tensor,
        start: int,  # noqa: ARG002
        stop: int,  # noqa: ARG002
        shared: Sequence[Tensor],  # noqa: ARG002
    ) -> Tensor:
        """Run the branch."""
        return self.residual.on_tokens(self.block, piece)


def _cut(plan: Plan, block: nn.Module, place: int, function: Callable[..., Tensor]) -> Cut | None:
    def by_tokens(x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        x = _as_weights(block, x)
        residual = plan.forms(block, x, args, kwargs)[1][place]
        run = partial(residual.on_tokens, block)
        kept = _kept(plan, place, block, run, x, x.shape[-1:]) if residual.keeps_tokens else None
        if kept is None:
            return Whole(args, kwargs)
        return _OnTokens(args, kwargs, math.prod(x.shape[:-1]), kept, residual, block)

    def by_samples(x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        x = _as_weights(block, x)

        def run(sample: Tensor) -> Tensor:
            return function(sample, *args, **kwargs)

        kept = None if has_rows(x, args, kwargs) else _kept(plan, place, block, run, x, x.shape[1:])
        return Whole(args, kwargs) if kept is None else Samples(args, kwargs, x.shape[0], kept)

    return {"tokens": by_tokens, "samples": by_samples}.get(plan.cuts[place] or "")


def _as_weights(block: nn.Module, x: Tensor) -> Tensor:
    """Return a tensor like the stream, values aside, in the dtype that the branch will get."""
    largest = max(block.parameters(), key=Tensor.numel, default=x)
    return x if largest.dtype == x.dtype else torch.empty_like(x, dtype=largest.dtype)


def _kept(
    plan: Plan,
    place: int,
    block: nn.Module,
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    unit: Sequence[int],
) -> int | None:
    """Count the elements that a unit keeps alive while a branch is differentiated.

    Returns:
        The number of elements; None if the branch does not run on fake tensors.
    """
    key = place, tuple(unit), x.dtype, x.device, block.training
    if key not in plan.kept:
        try:
            saved = _saved(block, run, x, (1, *unit))
        except Exception as error:  # what does not run on fake tensors is not cut
            _LOG.debug("%s is not cut into pieces: %s", type(block).__name__, error)
            plan.kept[key] = None
        else:
            # Besides what is saved: the input, the result, a gradient of the largest one between.
            plan.kept[key] = saved * 5 // 4 + 3 * math.prod(unit)
    return plan.kept[key]


def _saved(
    block: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, shape: tuple[int, ...]
) -> int:
    """Count the elements that autograd saves of a branch, on fake tensors that hold no values."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes() // tensor.element_size()
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    kind = x.device.type
    with fake_mode(x), torch.enable_grad(), torch.autocast(kind, enabled=False), uncached():
        leaf = torch.empty(shape, dtype=x.dtype, device=x.device, requires_grad=True)
        own = [fake_of(p, leaf).untyped_storage() for p in (*block.parameters(), *block.buffers())]
        with saved:
            run(leaf)
    for storage in own:  # parameters and buffers are saved too, but need no memory of their own
        storages.pop(storage._cdata, None)
    return sum(storages.values())
