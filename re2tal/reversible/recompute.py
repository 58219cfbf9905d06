"""Modules between the stages: their activations are computed anew instead of stored.

A stem or a down-sampling layer is not reversible. Its node keeps the way to its input, and replays
the module when its gradients are asked for. Where the input is a stage's merged streams, or frames
that are normalised from ``uint8``, nothing has to be kept for it at all.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils._pytree import tree_leaves

from re2tal.reversible.engine import leaf_of_trace, no_gradients_of_gradients, rebuild_of
from re2tal.reversible.replay import Autocast, Conditions, Draws, ReversibleError, uncached
from re2tal.reversible.step import differentiate, hooks_paused


class Recomputed:
    """The ``forward`` of a module that is recomputed in the backward pass.

    It stands in the module's own ``__dict__``, so that the module stays the same object of the same
    class. Its first argument and the first of its results are tensors; others are passed along. A
    call with another tensor that needs a gradient is not recomputed: it would not get one.

    Args:
        module: the module.
        where: name of the module in the model, for errors.

    Attributes:
        active: whether activations are recomputed; otherwise they are stored.
    """

    def __init__(self, module: nn.Module, where: str) -> None:
        self.module = module
        self.where = where
        self.active = True

    # A node with state cannot be traced.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch's has no types
    def __call__(self, x: Tensor | Proxy, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        if isinstance(x, Proxy):
            return leaf_of_trace(self.module, x, *args, **kwargs)
        needs = x.requires_grad or any(p.requires_grad for p in self.module.parameters())
        more = any(isinstance(a, Tensor) and a.requires_grad for a in tree_leaves((args, kwargs)))
        if more or not (self.active and needs and torch.is_grad_enabled()):
            return self.plain(x, *args, **kwargs)
        run = _Run(self, x, args, kwargs)
        y = _RecomputedNode.apply(run, x, *run.conditions.parameters)
        return y if run.others is None else (y, *run.others)

    def plain(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        return type(self.module).forward(self.module, x, *args, **kwargs)


class _Run:
    """One run of a module, and all that its replay needs."""

    def __init__(self, owner: Recomputed, x: Tensor, args: Any, kwargs: Any) -> None:
        self.owner = owner
        self.where = owner.where
        self.conditions = Conditions(
            [owner.module], x.device, Autocast(x.device), owner.where, hooked=[owner.module]
        )
        self.others: tuple[Any, ...] | None = None
        self._arguments = args, kwargs
        self._needs_gradient = x.requires_grad
        self.rebuild = rebuild_of(x)
        self._draws = Draws()

    def forward(self, x: Tensor) -> Tensor:
        with self.conditions.noted(), torch.enable_grad():
            self._draws.mark(x, self.conditions.devices)
            _, y, self.others = self._once(x)
        self._draws.settle()
        if any(isinstance(o, Tensor) and o.requires_grad for o in tree_leaves(self.others)):
            raise ReversibleError(
                f"{self.where} returns more than one tensor that needs a gradient, and only the "
                "first would pass it on. Call rewire(model, recompute=False)."
            )
        return y.detach()

    def replay(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input as a leaf, and the result with its history."""
        with self.conditions.met_again(), torch.enable_grad(), self._draws.replayed(0):
            leaf, y, _ = self._once(x)
        return leaf, y

    def _once(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...] | None]:
        leaf = x.detach().requires_grad_(self._needs_gradient)
        args, kwargs = self._arguments
        with uncached():
            result = self.owner.plain(leaf, *args, **kwargs)
        if isinstance(result, tuple):
            return leaf, result[0], result[1:]
        return leaf, result, None


class _RecomputedNode(torch.autograd.Function):
    """Result of a module from its input and its parameters."""

    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, *_parameters: Tensor) -> Tensor:
        ctx.run = run
        if run.rebuild is None:
            ctx.save_for_backward(x)  # autograd lets go of it with the graph
        return run.forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        no_gradients_of_gradients(run.where)
        _, needs_input, *needs_parameters = ctx.needs_input_grad
        parameters = zip(run.conditions.parameters, needs_parameters, strict=True)
        wanted = [p for p, needed in parameters if needed]
        leaf, y = run.replay(_input(ctx))
        inputs = [*([leaf] if needs_input else []), *wanted]
        with hooks_paused(wanted):
            found = iter(differentiate(y, inputs, gradients[0]))
        to_input = next(found) if needs_input else None
        return (None, to_input, *(next(found) if needed else None for needed in needs_parameters))


def _input(ctx: Any) -> Tensor:
    run: _Run = ctx.run
    if run.rebuild is not None:
        return run.rebuild()
    x: Tensor
    try:
        (x,) = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise ReversibleError(
            f"{run.where}: its input was modified in place between the forward and its backward. "
            "Use the out-of-place form of that operation."
        ) from error
    return x
