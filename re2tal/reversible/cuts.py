"""How a branch is cut into pieces that run one after another, so that only one is in memory.

A branch that treats the units of its input alike (the tokens of an MLP, the windows of a window
attention, the samples of a convolution) gives the same result piece by piece. The number of units
in a piece follows from a budget of bytes, and from shapes only: the forward and its replay cut
alike, which bit-exact replays need.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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

    @property
    def units(self) -> int:
        """See above."""
        ...

    @property
    def elements(self) -> int:
        """See above."""
        ...

    @property
    def contiguous(self) -> bool:
        """See above."""
        ...

    def share(self) -> tuple[Tensor, ...]:
        """What all pieces use and is computed once, with gradients: a relative position bias."""
        ...

    def new(self, piece: Tensor, shape: torch.Size) -> Tensor:
        """An empty tensor of the input's shape, for `put` to fill with pieces like this one."""
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
class _Called:
    """What layouts share whose pieces the branch itself is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    contiguous = True

    def share(self) -> tuple[Tensor, ...]:
        """Nothing."""
        return ()

    def new(self, piece: Tensor, shape: torch.Size) -> Tensor:
        """An empty tensor, contiguous."""
        return piece.new_empty(shape)

    def run(
        self,
        branch: Callable[..., Tensor],
        piece: Tensor,
        start: int,  # noqa: ARG002
        stop: int,  # noqa: ARG002
        shared: Sequence[Tensor],  # noqa: ARG002
    ) -> Tensor:
        """The branch's result."""
        return branch(piece, *self.args, **self.kwargs)


@dataclass(frozen=True, slots=True)
class Whole(_Called):
    """One unit: the branch runs on the whole input."""

    units = 1
    elements = 0

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:  # noqa: ARG002
        """The input itself."""
        return x

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:  # noqa: ARG002
        """Write all of it."""
        out.copy_(piece)


@dataclass(frozen=True, slots=True)
class _Tokens(_Called):
    """Vectors along the last dimension."""

    units: int
    elements: int

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """A view, where the input is contiguous."""
        return x.reshape(self.units, x.shape[-1])[start:stop]

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Write some rows."""
        out.view(self.units, out.shape[-1])[start:stop] = piece


@dataclass(frozen=True, slots=True)
class _Samples(_Called):
    """Samples of a batch, in the memory format that they have: convolutions are chosen by it."""

    units: int
    elements: int

    def new(self, piece: Tensor, shape: torch.Size) -> Tensor:
        """An empty tensor, its samples laid out as those of the piece."""
        inner = sorted(range(1, piece.ndim), key=piece.stride, reverse=True)
        return torch.empty_permuted(shape, (0, *inner), dtype=piece.dtype, device=piece.device)

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """A view."""
        return x[start:stop]

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Write some samples."""
        out[start:stop] = piece


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
        return _Tokens(args, kwargs, prod(x.shape[:-1]), self.width)


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
        return _Samples(args, kwargs, x.shape[0], int(self.growth * prod(x.shape[1:])))


def spans(layout: Layout, budget: int) -> list[tuple[int, int]]:
    """First and last unit of each piece: as many units as the budget of bytes holds, at least one.

    The pieces are of equal size up to one unit, so that none is left with a handful of units.
    """
    fitting = max(1, budget // max(1, layout.elements * BYTES_PER_ELEMENT))
    count = -(-layout.units // fitting)
    edges = [layout.units * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def per_unit(factor: Tensor, layout: Layout, start: int, stop: int, dims: int) -> Tensor:
    """A factor for each sample, ``(B, 1)``, as one for each unit of a piece, ``(n, 1, ..., 1)``."""
    if layout.units > 1:
        per_sample = layout.units // factor.shape[0]
        index = torch.arange(start, stop, device=factor.device) // per_sample
        factor = factor.reshape(-1)[index]
    return factor.view(-1, *(1,) * (dims - 1))
