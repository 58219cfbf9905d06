"""Pieces in which a branch, or a module between the stages, runs: their spans, and what joins them.

A forward cuts its input into pieces, and joins the results. A replay does the same, joins the
gradients of the pieces' inputs, and sums those of the parameters over the pieces.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from re2tal.reversible.layouts import BYTES_PER_ELEMENT, Layout

Span = tuple[int, int]
"""Units ``start:stop`` of a piece."""


def spans(layout: Layout, budget: int) -> list[Span]:
    """Cut the units into as few pieces as the budget of bytes allows, of at least one unit each.

    The sizes of the pieces differ by one unit at most, so that the last is not a small remainder.
    """
    fitting = max(1, budget // max(1, layout.elements * BYTES_PER_ELEMENT))
    count = -(-layout.units // fitting)
    edges = [layout.units * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def decisive(cuts: list[Span]) -> list[Span]:
    """Choose the pieces that determine the peak of memory, for a prediction on fake tensors.

    These are the last two, with which a backward begins, and the largest of the others: from the
    third piece on, the sums of gradients, the gradients of the piece before and those of the
    present piece are alive at the same time.
    """
    return sorted(cuts[:-2], key=lambda span: span[0] - span[1])[:1] + cuts[-2:]


def per_unit(factor: Tensor, layout: Layout, start: int, stop: int, dims: int) -> Tensor:
    """Expand one factor per sample, ``(B, 1)``, to one per unit of a piece, ``(n, 1, ..., 1)``."""
    if layout.units > 1:
        per_sample = layout.units // factor.shape[0]
        first, last = start // per_sample, (stop - 1) // per_sample
        factor = factor.reshape(-1)
        if first == last:  # the whole piece lies in one sample: a view, no gather
            factor = factor[first : first + 1]
        else:
            index = torch.arange(start, stop, device=factor.device) // per_sample
            factor = factor[index]
    return factor.view(-1, *(1,) * (dims - 1))


class Joined:
    """Tensor of the input's shape that is joined from pieces.

    Attributes:
        tensor: the tensor so far; None before the first piece.
    """

    def __init__(self, layout: Layout, shape: torch.Size) -> None:
        self._layout = layout
        self._shape = shape
        self.tensor: Tensor | None = None

    def put(self, span: Span, piece: Tensor) -> None:
        """Write a piece to its place."""
        if self._layout.contiguous and span == (0, self._layout.units):
            self.tensor = shaped(piece, self._shape)
            return
        if self.tensor is None:
            self.tensor = self._layout.new(piece, self._shape)
        self._layout.put(self.tensor, *span, piece)

    def result(self) -> Tensor:
        """Return the tensor, once all pieces are written."""
        assert self.tensor is not None
        return self.tensor


def shaped(x: Tensor, shape: torch.Size) -> Tensor:
    """Give a tensor a shape; where it has the shape, reshape() would lose the memory format."""
    return x if x.shape == shape else x.reshape(shape)


class Take(torch.autograd.Function):
    """Cut a tensor into its pieces; the backward joins their gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(layout: Layout, cuts: Sequence[Span], x: Tensor) -> tuple[Tensor, ...]:
        """Copy the pieces out of a tensor."""
        return tuple(layout.take(x, *span).clone() for span in cuts)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        """Keep the layout."""
        ctx.layout, ctx.cuts, x = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        """Join the gradients of the pieces."""
        joined = Joined(ctx.layout, ctx.shape)
        for span, gradient in zip(ctx.cuts, gradients, strict=True):
            joined.put(span, gradient)
        return None, None, joined.result()


class Join(torch.autograd.Function):
    """Join a tensor from its pieces; the backward cuts its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(layout: Layout, cuts: Sequence[Span], shape: torch.Size, *pieces: Tensor) -> Tensor:
        """Write the pieces to their places in one tensor."""
        joined = Joined(layout, shape)
        for span, piece in zip(cuts, pieces, strict=True):
            joined.put(span, piece)
        return joined.result()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        """Keep the layout."""
        ctx.layout, ctx.cuts = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Cut the gradient into those of the pieces."""
        taken = (ctx.layout.take(gradients[0], *span) for span in ctx.cuts)
        return None, None, None, *taken


def differentiate(
    result: Tensor | GradientEdge, inputs: Sequence[Tensor], gradient: Tensor
) -> list[Tensor | None]:
    """Compute the gradients of the inputs; None for an input that the result does not depend on."""
    if not inputs:
        return []
    return list(torch.autograd.grad(result, inputs, gradient, allow_unused=True))


class Totals:
    """Sums of gradients over the pieces, by one call of PyTorch a piece.

    Attributes:
        values: the sums so far; None stands for zero.
    """

    def __init__(self, count: int) -> None:
        self.values: list[Tensor | None] = [None] * count
        self._own: set[int] = set()

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of one piece, in the order of the sums."""
        into: list[int] = []
        anew: list[int] = []
        for i, (total, gradient) in enumerate(zip(self.values, gradients, strict=True)):
            if total is None:
                self.values[i] = gradient
            elif gradient is not None:
                # In place only into memory of our own: autograd may share that of the first piece's
                # gradients with something else.
                (into if i in self._own else anew).append(i)
        if into:
            torch._foreach_add_(*self._pairs(into, gradients))
        if anew:
            for i, total in zip(
                anew, torch._foreach_add(*self._pairs(anew, gradients)), strict=True
            ):
                self.values[i] = total
            self._own.update(anew)

    def _pairs(self, chosen: list[int], gradients: Sequence[Tensor | None]) -> Any:
        return [self.values[i] for i in chosen], [gradients[i] for i in chosen]


@contextmanager
def hooks_paused(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Remove the hooks of parameters for a block of code.

    `torch.autograd.grad` would call them inside a node's backward, and autograd calls them on the
    gradients that the node returns: a hook that halves a gradient would quarter it.
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
