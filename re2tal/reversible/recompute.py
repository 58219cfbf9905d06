"""Modules between the stages: their activations are computed anew instead of stored.

A stem or a down-sampling layer is not reversible. Its node keeps the way to its input, and replays
the module when its gradients are asked for. Where the input is a stage's merged streams, or frames
that are normalised from ``uint8``, nothing has to be kept for it at all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.fx import Proxy
from torch.utils._pytree import tree_leaves

from re2tal.reversible.branches import BySample, Layout, Leading, recomputed, spans
from re2tal.reversible.coupling import Budget, bytes_of_piece
from re2tal.reversible.engine import (
    give_up,
    leaf_of_trace,
    no_gradients_of_gradients,
    rebuild_of,
)
from re2tal.reversible.replay import (
    Autocast,
    Conditions,
    Draws,
    ReversibleError,
    counts_statistics,
    uncached,
)
from re2tal.reversible.step import (
    Join,
    Joined,
    Span,
    Take,
    Totals,
    decisive,
    differentiate,
    hooks_paused,
)

_Pieces = tuple[Layout, list[Span], Tensor]
"""Layout of an input whose first dimensions are one, the spans of its pieces, and that input."""


class Recomputed:
    """The ``forward`` of a module that is recomputed in the backward pass.

    It stands in the module's own ``__dict__``, so that the module stays the same object of the same
    class. Its first argument and the first of its results are tensors; others are passed along. A
    call with another tensor that needs a gradient is not recomputed: it would not get one.

    Args:
        module: the module.
        where: name of the module in the model, for errors.
        slice_bytes: budget of a piece, for a module that runs in pieces.

    Attributes:
        active: whether activations are recomputed; otherwise they are stored.
    """

    def __init__(self, module: nn.Module, where: str, slice_bytes: Budget = "auto") -> None:
        self.module = module
        self.where = where
        self.slice_bytes = slice_bytes
        self.active = True

    # A node with state cannot be traced.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch's has no types
    def __call__(self, x: Tensor | Proxy, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        if isinstance(x, Proxy):
            return leaf_of_trace(self.module, x, *args, **kwargs)
        needs = x.requires_grad or any(p.requires_grad for p in self.module.parameters())
        more = any(isinstance(a, Tensor) and a.requires_grad for a in tree_leaves((args, kwargs)))
        stores = not torch.is_grad_enabled() or torch.compiler.is_exporting()
        stores |= torch._C._are_functorch_transforms_active()  # which pass through no such node
        if more or stores or not (self.active and needs):
            return self.plain(x, *args, **kwargs)
        run = _Run(self, x, args, kwargs)
        y = _RecomputedNode.apply(run, x, *run.conditions.parameters)
        if run.rebuild is not None:
            give_up(x)
        return y if run.others is None else (y, *run.others)

    def plain(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, in pieces where it may."""
        pieces = self.cut(x, args, kwargs)
        if pieces is None:
            return self.once(x, *args, **kwargs)
        # Taken apart and joined as a stage does it, so that gradients are summed in its order.
        layout, cuts, flat = pieces
        with uncached():
            parts = [self.once(part) for part in Take.apply(layout, cuts, flat)]
        whole: Tensor = Join.apply(layout, cuts, flat.shape[:1] + parts[0].shape[1:], *parts)
        return whole.unflatten(0, x.shape[: x.ndim - flat.ndim + 1])

    def once(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward."""
        return type(self.module).forward(self.module, x, *args, **kwargs)

    def cut(self, x: Tensor, args: Any = (), kwargs: Any = None) -> "_Pieces | None":
        """Cut an input into pieces; None if the module runs whole."""
        how = recomputed(self.module)
        if not isinstance(how, Leading) or args or kwargs or self.slice_bytes is None:
            return None
        if (
            x.ndim <= how.inner
            or x.numel() == 0
            or any(map(counts_statistics, self.module.modules()))
        ):
            return None
        flat = x.flatten(0, -how.inner - 1)
        layout = BySample(how.growth)(flat)
        weights = sum(p.nbytes for p in self.module.parameters())
        cuts = spans(layout, bytes_of_piece(self.slice_bytes, x, weights))
        return None if len(cuts) == 1 else (layout, cuts, flat)


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
        self._cuts: Sequence[Span] | None = None

    def forward(self, x: Tensor) -> Tensor:
        args, kwargs = self._arguments
        pieces = self.owner.cut(x, args, kwargs)
        with self.conditions.noted(), torch.enable_grad():
            if pieces is None:
                self._mark(x)
                _, y = self._once(x)
            else:
                layout, cuts, flat = pieces
                self._cuts = decisive(cuts) if isinstance(x, FakeTensor) else cuts
                joined: Joined | None = None
                for span in self._cuts:
                    self._mark(x)
                    part = self._once(layout.take(flat, *span))[1].detach()
                    joined = joined or Joined(layout, flat.shape[:1] + part.shape[1:])
                    joined.put(span, part)
                assert joined is not None
                y = joined.result().unflatten(0, x.shape[: x.ndim - flat.ndim + 1])
        self._draws.settle()
        if any(isinstance(o, Tensor) and o.requires_grad for o in tree_leaves(self.others)):
            raise ReversibleError(
                f"{self.where} returns more than one tensor that needs a gradient, and only the "
                "first would pass it on. Call rewire(model, recompute=False)."
            )
        return y.detach()

    def differentiate(
        self, x: Tensor, gradient: Tensor, wanted: Sequence[Tensor], *, to_input: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Run the module again for the gradients of its input and of its wanted parameters."""
        if self._cuts is None:
            leaf, edge = self._replay(x, 0)
            inputs = [*wanted, *([leaf] if to_input else [])]
            del x, leaf  # nothing may need the values any more
            found = differentiate(edge, inputs, gradient)
            return (found.pop() if to_input else None), found
        pieces = self.owner.cut(x)
        assert pieces is not None
        layout, _, flat = pieces
        gradient = gradient.flatten(0, x.ndim - flat.ndim)
        joined = Joined(layout, flat.shape)
        totals = Totals(len(wanted))
        for part in reversed(range(len(self._cuts))):  # as autograd sums over uses
            span = self._cuts[part]
            leaf, edge = self._replay(layout.take(flat, *span), part)
            inputs = [*wanted, *([leaf] if to_input else [])]
            found = differentiate(edge, inputs, layout.take(gradient, *span))
            del leaf, edge
            if to_input:
                into = found.pop()
                assert into is not None
                joined.put(span, into)
                del into
            totals.add(found)
        return (joined.result().view(x.shape) if to_input else None), totals.values

    def _replay(self, x: Tensor, part: int) -> tuple[Tensor, GradientEdge]:
        """Return the input as a leaf, and the history of the result, whose values are spent."""
        with self.conditions.met_again(), torch.enable_grad(), self._draws.replayed(part):
            leaf, y = self._once(x)
        return leaf, get_gradient_edge(y)

    def _once(self, x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_(self._needs_gradient)
        args, kwargs = self._arguments
        with uncached():
            result = self.owner.once(leaf, *args, **kwargs)
        if isinstance(result, tuple):
            self.others = result[1:]
            return leaf, result[0]
        return leaf, result

    def _mark(self, x: Tensor) -> None:
        self._draws.mark(x, self.conditions.devices)


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
        with hooks_paused(wanted):
            to_input, to_parameters = run.differentiate(
                _input(ctx), gradients[0], wanted, to_input=needs_input
            )
        found = iter(to_parameters)
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
