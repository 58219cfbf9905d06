"""One branch of one forward: its first run, and the repetition that yields its gradients."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from re2tal.reversible.call import BranchCall, Joined, Span
from re2tal.reversible.cuts import Layout
from re2tal.reversible.grid import Grid
from re2tal.reversible.randomness import Draws
from re2tal.reversible.replay import Autocast, Conditions, ReversibleError, Surroundings


@dataclass(frozen=True, slots=True)
class Repetition:
    """What repeating a branch yields.

    Attributes:
        increment: of ``x_i``, as in the first run.
        owned: whether nothing else holds the increment's memory.
        to_input: the gradient that the increment passes to its input; None for zero.
        to_parameters: the gradients of the wanted parameters; None where a parameter is not used.
    """

    increment: Tensor
    owned: bool
    to_input: Tensor | None
    to_parameters: list[Tensor | None]


class Step:
    """A branch of one forward.

    The first run records gradients and drops the record piece by piece: kernels may be chosen by
    whether an input needs a gradient, and the repetition must meet the same ones.

    Args:
        call: the branch as it is called.
        grid: of its stage's streams; None is plain floating point.
        autocast: the state in which it runs.
        needs_gradient: whether its input needs a gradient.
        device: where it runs.
    """

    def __init__(
        self,
        call: BranchCall,
        grid: Grid | None,
        autocast: Autocast,
        device: torch.device,
        *,
        needs_gradient: bool,
    ) -> None:
        self.where = call.where
        self._call = call
        self._grid = grid
        self._needs_gradient = needs_gradient
        self._conditions = Conditions(call.branch.modules, device, autocast, call.where)
        self._draws = Draws()
        self._cuts: list[Span] = []

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """Of the branch, each once."""
        return self._conditions.parameters

    def first(self, current: Tensor) -> Tensor:
        """Run the branch on ``x_{i-1}``: its increment."""
        with self._conditions.noted(), torch.enable_grad():
            self._mark(current)
            layout, cuts = self._call.layout(current.detach())
            self._cuts = _telling(cuts) if isinstance(current, FakeTensor) else cuts
            shared, factor = self._call.share(layout, current.detach())
            joined = Joined(layout, current.shape)
            for span in self._cuts:
                self._mark(current)
                leaf = self._leaf(layout, span, current)
                result = self._call.piece(layout, span, leaf, shared, factor)
                if span == self._cuts[0]:
                    self._refuse_others(result, leaf)
                joined.put(span, self._increment(result))
                del result, leaf  # and with them what autograd has stored for the piece
        self._draws.settle()
        return joined.result()

    def again(
        self,
        current: Tensor,
        gradient: Tensor | None,
        wanted: Sequence[Tensor] = (),
        *,
        to_input: bool = False,
    ) -> Repetition:
        """Repeat the run, piece by piece.

        Args:
            current: ``x_{i-1}``, as it was.
            gradient: of ``x_i``; None repeats without gradients.
            wanted: the parameters whose gradients are wanted.
            to_input: whether the input's is.

        Raises:
            ReversibleError: if the branch is no longer the one that ran first.
        """
        surroundings = Surroundings(current.device)
        with self._conditions.repeated(), torch.enable_grad(), hooks_paused(wanted):
            with self._draws.revisited(0):
                layout, _ = self._call.layout(current)
                shared, factor = self._call.share(layout, current)
            leaves = [s.detach().requires_grad_(s.requires_grad) for s in shared]
            joined, passed = Joined(layout, current.shape), Joined(layout, current.shape)
            needing = [s for s in leaves if s.requires_grad]
            sums = _Sums(len(wanted) + len(needing))
            # Autograd sums over the uses of a parameter from the last to the first, and sums of
            # floating-point numbers depend on their order.
            for part in reversed(range(len(self._cuts))):
                span = self._cuts[part]
                with self._draws.revisited(1 + part):
                    leaf = self._leaf(layout, span, current)
                    result = self._call.piece(layout, span, leaf, leaves, factor)
                joined.put(span, self._increment(result))
                if gradient is None or not result.requires_grad:
                    continue
                edge = get_gradient_edge(result)  # not the tensor: its values are spent
                del result
                inputs = [*wanted, *needing, *([leaf] if to_input else [])]
                with surroundings.restored():
                    found = differentiate(edge, inputs, layout.take(gradient, *span))
                if to_input and (into := found.pop()) is not None:
                    passed.put(span, into)
                sums.add(found)
            total = sums.totals[: len(wanted)]
            with surroundings.restored():
                _through_shared(shared, sums.totals[len(wanted) :], wanted, total)
        owned = joined.fresh or self._grid is not None
        return Repetition(joined.result(), owned, passed.tensor, total)

    def _leaf(self, layout: Layout, span: Span, stream: Tensor) -> Tensor:
        piece = layout.take(stream.detach(), *span)
        return piece.detach().requires_grad_(self._needs_gradient)

    def _refuse_others(self, result: Tensor, leaf: Tensor) -> None:
        """Make sure that the gradient goes to the input and the parameters, and nowhere else."""
        known = {id(leaf), *map(id, self.parameters)}
        for tensor in _leaves(result):
            if id(tensor) not in known:
                raise ReversibleError(
                    f"{self.where} uses a tensor of shape {tuple(tensor.shape)} that needs a "
                    "gradient and is neither its input nor a parameter of its modules, so it would "
                    "get none. Name its module in the branch, detach it, or call "
                    "set_reversible(model, False)."
                )

    def _increment(self, result: Tensor) -> Tensor:
        result = result.detach()
        return result if self._grid is None else self._grid.round(result)

    def _mark(self, stream: Tensor) -> None:
        self._draws.mark(stream, self._conditions.devices)


def steps_of(calls: Sequence[BranchCall], stream: Tensor, grid: Grid | None) -> list[Step]:
    """The steps of one forward, with all that needs a gradient marked as such."""
    autocast, needs, steps = Autocast(stream.device), stream.requires_grad, []
    for call in calls:
        step = Step(call, grid, autocast, stream.device, needs_gradient=needs)
        needs = needs or any(p.requires_grad for p in step.parameters)
        steps.append(step)
    return steps


def _leaves(result: Tensor) -> Iterator[Tensor]:
    """The tensors that a result passes gradients to and that were not computed themselves."""
    found: list[Any] = [result.grad_fn]
    seen: set[Any] = set()
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += (following for following, _ in node.next_functions)
        if hasattr(node, "variable"):
            yield node.variable


def _telling(cuts: list[Span]) -> list[Span]:
    """The pieces that decide how much memory is needed, for tensors without values.

    The last two, with which a backward begins, and the largest of the others: from the third piece
    on, the sums of gradients, the last piece's gradients and the present one's live side by side.
    """
    return sorted(cuts[:-2], key=lambda span: span[0] - span[1])[:1] + cuts[-2:]


class _Sums:
    """Running sums of gradients; None stands for zero."""

    def __init__(self, count: int) -> None:
        self.totals: list[Tensor | None] = [None] * count

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        self.totals = [add(a, b) for a, b in zip(self.totals, gradients, strict=True)]


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum; None stands for zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def differentiate(
    result: Tensor | GradientEdge, inputs: Sequence[Tensor], gradient: Tensor
) -> list[Tensor | None]:
    """The gradients of the inputs; None where the result does not depend on one."""
    if not inputs:
        return []
    return list(torch.autograd.grad(result, inputs, gradient, allow_unused=True))


def _through_shared(
    shared: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[Tensor],
    totals: list[Tensor | None],
) -> None:
    """Pass the gradients of what the pieces shared on to the parameters, in place of `totals`."""
    needing = [s for s in shared if s.requires_grad]
    used = [(s, g) for s, g in zip(needing, gradients, strict=True) if g is not None]
    if not used or not wanted:
        return
    tensors, grads = zip(*used, strict=True)
    found = torch.autograd.grad(tensors, wanted, grads, allow_unused=True)
    totals[:] = [add(a, b) for a, b in zip(totals, found, strict=True)]


@contextmanager
def hooks_paused(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Keep the parameters' own hooks for the outer backward.

    `torch.autograd.grad` calls them, and autograd will call them again on what a node returns: a
    hook that halves a gradient would quarter it.
    """
    paused = []
    for parameter in parameters:
        hooks = getattr(parameter, "_backward_hooks", None)
        if hooks:
            paused.append((hooks, OrderedDict(hooks)))
            hooks.clear()
    try:
        yield
    finally:
        for hooks, saved in paused:
            hooks.update(saved)
