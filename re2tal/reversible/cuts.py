"""How a branch is cut into pieces that run one after another, so that only one is in memory.

A branch that treats the units of its input alike (the tokens of an MLP, the windows of a window
attention, the samples of a convolution) gives the same result piece by piece. The number of units
in a piece follows from a budget of bytes, and from shapes only: the forward and its replay cut
alike, which bit-exact replays need.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

BYTES_PER_ELEMENT = 4
"""Counted for every element; under autocast a piece stays below its budget."""


class Layout(Protocol):
    """The units of one input.

    Attributes:
        units: how many there are; the same number for each sample of the batch, sample by sample.
        elements: elements that a unit keeps alive while the branch is differentiated.
        contiguous: whether the piece of all units is the input itself, in another shape.
    """

    units: int
    elements: int
    contiguous: bool

    def share(self) -> tuple[Tensor, ...]:
        """What all pieces use and is computed once, with gradients: a relative position bias."""
        ...

    def new(self, like: Tensor) -> Tensor:
        """An empty tensor like one of the input's shape, for `put` to fill."""
        ...

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The units ``start:stop`` of a tensor shaped like the input; units come first."""
        ...

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Write a piece to its place in a tensor shaped like the input."""
        ...

    def run(
        self, branch: Any, piece: Tensor, start: int, stop: int, shared: Sequence[Tensor]
    ) -> Tensor:
        """The branch's result for a piece, of the piece's shape."""
        ...


class Cut(Protocol):
    """How to lay out the units of an input: ``cut(x, *args, **kwargs)``, with the block's call."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        """The layout of this input."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """One unit: the branch runs on the whole input."""

    args: tuple[Any, ...] = ()
    kwargs: Any = None
    units: int = 1
    elements: int = 0
    contiguous: bool = True

    def share(self) -> tuple[Tensor, ...]:
        return ()

    def new(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:  # noqa: ARG002
        return x

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:  # noqa: ARG002
        out.copy_(piece)

    def run(
        self,
        branch: Any,
        piece: Tensor,
        start: int,  # noqa: ARG002
        stop: int,  # noqa: ARG002
        shared: Sequence[Tensor],  # noqa: ARG002
    ) -> Tensor:
        result: Tensor = branch(piece, *self.args, **(self.kwargs or {}))
        return result


@dataclass(frozen=True, slots=True)
class _Rows:
    """Units that lie one after another in memory."""

    units: int
    elements: int
    unit_shape: tuple[int, ...]
    args: tuple[Any, ...] = ()
    kwargs: Any = None
    contiguous: bool = True

    def share(self) -> tuple[Tensor, ...]:
        return ()

    def new(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x.reshape(self.units, *self.unit_shape)[start:stop]

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        out.view(self.units, *self.unit_shape)[start:stop] = piece

    def run(
        self, branch: Any, piece: Tensor, start: int, stop: int, shared: Sequence[Tensor]
    ) -> Tensor:
        result: Tensor = branch(piece, *self.args, **(self.kwargs or {}))
        return result


@dataclass(frozen=True, slots=True)
class ByToken:
    """For a branch that treats all positions alike: LayerNorm over the last dimension, an MLP.

    The branch is called with ``(tokens, C)``.

    Attributes:
        width: elements that one token keeps alive while the branch is differentiated, roughly the
            sum of the widths of all its intermediate results.
    """

    width: int

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        """Every vector along the last dimension is a unit."""
        return _Rows(prod(x.shape[:-1]), self.width, (x.shape[-1],), args, kwargs)


@dataclass(frozen=True, slots=True)
class BySample:
    """For a branch that treats the samples of a batch alike: convolutions, global attention.

    Batch statistics tie samples together: a branch with a BatchNorm in training mode is not cut.

    Attributes:
        growth: elements that are alive while the branch is differentiated, per element of input.
    """

    growth: float

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        """Every sample of the batch is a unit."""
        sample = tuple(x.shape[1:])
        return _Rows(x.shape[0], int(self.growth * prod(sample)), sample, args, kwargs)


def spans(layout: Layout, budget: int) -> list[tuple[int, int]]:
    """First and last unit of each piece: as many units as the budget of bytes holds, at least one.

    The pieces are of equal size up to one unit, so that none is left with a handful of units.
    """
    fitting = max(1, budget // max(1, layout.elements * BYTES_PER_ELEMENT))
    count = -(-layout.units // fitting)
    edges = [layout.units * i // count for i in range(count + 1)]
    return list(zip(edges, edges[1:], strict=False))


def per_unit(factor: Tensor, layout: Layout, start: int, stop: int, dims: int) -> Tensor:
    """A factor for each sample, ``(B, 1)``, as one for each unit of a piece, ``(n, 1, ..., 1)``."""
    if layout.units > 1:
        per_sample = layout.units // factor.shape[0]
        index = torch.arange(start, stop, device=factor.device) // per_sample
        factor = factor.reshape(-1)[index]
    return factor.view(-1, *(1,) * (dims - 1))
