"""Modules between the stages: the backward recomputes their activations instead of storing them.

A stem or a down-sampling layer ``y = M(x; theta)`` is not reversible. Its autograd node keeps ``x``
and replays ``M`` in the backward for ``(dM/dx)^T g`` and ``(dM/dtheta)^T g``. If ``x`` can be
rebuilt (the merged streams of a stage, or frames normalised from ``uint8``), the node keeps only
the function that rebuilds it; see `tensors.rebuildable`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.fx import Proxy
from torch.utils._pytree import tree_leaves

from re2tal.reversible.branches import Leading, recomputed
from re2tal.reversible.coupling import Budget, bytes_of_piece
from re2tal.reversible.engine import leaf_of_trace, no_gradients_of_gradients
from re2tal.reversible.layouts import BySample, Layout
from re2tal.reversible.pieces import (
    Join,
    Joined,
    Span,
    Take,
    Totals,
    decisive,
    differentiate,
    hooks_paused,
    spans,
)
from re2tal.reversible.replay import (
    Autocast,
    Conditions,
    Draws,
    ReversibleError,
    counts_statistics,
    uncached,
)
from re2tal.reversible.tensors import give_up, rebuild_of

_Pieces = tuple[Layout, list[Span], Tensor]
"""Layout of an input, spans of its pieces, and the input with its batch dimensions flattened."""


class Recomputed:
    """Replacement of ``forward`` in a module that is recomputed in the backward pass.

    It stands in the module's own ``__dict__``, so the module stays the same object of the same
    class. The first argument and the first result are tensors; other arguments and results are
    passed along. If another argument needs a gradient, the call is stored as usual, since the node
    would give that argument none.

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

    # The autograd node keeps state, which torch.compile cannot trace.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch's has no types
    def __call__(self, x: Tensor | Proxy, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        if isinstance(x, Proxy):
            return leaf_of_trace(self.module, x, *args, **kwargs)
        if torch.jit.is_tracing():  # it cannot record autograd nodes of one's own
            return self.once(x, *args, **kwargs)
        needs = x.requires_grad or any(p.requires_grad for p in self.module.parameters())
        more = any(isinstance(a, Tensor) and a.requires_grad for a in tree_leaves((args, kwargs)))
        stores = not torch.is_grad_enabled() or torch.compiler.is_exporting()
        # torch.func transforms do not pass through an autograd node with state.
        stores |= torch._C._are_functorch_transforms_active()
        if more or stores or not (self.active and needs):
            return self.plain(x, *args, **kwargs)
        run = _Run(self, x, args, kwargs)
        y = _RecomputedNode.apply(run, x, *run.conditions.parameters)
        if run.rebuild is not None:
            give_up(x)
        return y if run.others is None else (y, *run.others)

    def plain(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with stored activations, in pieces if it allows that."""
        pieces = self.cut(x, args, kwargs)
        if pieces is None:
            return self.once(x, *args, **kwargs)
        # Cut and joined as in the recomputing run, so that gradients are summed in the same order.
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
    """One run of a module, with the state that its replay needs."""

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
            del x, leaf  # the graph holds what it needs; other values are freed before it runs
            found = differentiate(edge, inputs, gradient)
            return (found.pop() if to_input else None), found
        pieces = self.owner.cut(x)
        assert pieces is not None
        layout, _, flat = pieces
        gradient = gradient.flatten(0, x.ndim - flat.ndim)
        joined = Joined(layout, flat.shape)
        totals = Totals(len(wanted))
        # Last piece first: autograd sums the gradients of several uses in this order.
        for part in reversed(range(len(self._cuts))):
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
        """Return the input as a leaf, and the gradient edge of the result.

        An edge holds the history of a result but not its values, which nothing needs.
        """
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
    """Autograd node of a recomputed module, from its input and its parameters to its result."""

    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, *_parameters: Tensor) -> Tensor:
        ctx.run = run
        if run.rebuild is None:
            ctx.save_for_backward(x)  # autograd frees it with the graph, and sees in-place changes
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
