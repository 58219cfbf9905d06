"""Layouts: the units of an input in which a branch may run piece by piece.

Some branches treat the units of their input independently: an MLP its tokens, a window attention
its windows, a convolution the samples of a batch. Run piece by piece, such a branch gives the same
result, and the activations of only one piece are in memory. The number of units in a piece depends
on a budget of bytes and on shapes, never on values: the replay must cut as the forward did to be
bit-exact.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from re2tal.reversible.coupling import Grid, accumulate, fused

BYTES_PER_ELEMENT = 4
"""Bytes counted for every element. Under autocast elements are smaller, and a piece stays below its
budget."""


class Layout(Protocol):
    """Units of one input, in which a branch can be cut."""

    @property
    def units(self) -> int:
        """Number of units. Each sample has equally many, and the units of a sample are adjacent."""
        ...

    @property
    def elements(self) -> int:
        """Number of elements that a unit keeps alive while the branch is differentiated."""
        ...

    @property
    def contiguous(self) -> bool:
        """Tell whether the piece of all units is the input itself in another shape, not a copy."""
        ...

    @property
    def light(self) -> bool:
        """Tell whether the layout's own tensors are small enough to keep for the backward."""
        ...

    def share(self) -> tuple[Tensor, ...]:
        """Compute the tensors that all pieces use, once and with gradients: a position bias."""
        ...

    def new(self, piece: Tensor, shape: torch.Size) -> Tensor:
        """Make an empty tensor of the input's shape, which `put` fills with such pieces."""
        ...

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Return the units ``start:stop`` of a tensor shaped like the input, ``(units, ...)``."""
        ...

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Write a piece to its place in a tensor made by `new`."""
        ...

    def add(
        self,
        out: Tensor,
        start: int,
        stop: int,
        piece: Tensor,
        grid: Grid | None = None,
        sign: int = 1,
    ) -> None:
        """Add a piece to its place in any tensor shaped like the input, as `accumulate` does."""
        ...

    def run(
        self, branch: Any, piece: Tensor, start: int, stop: int, shared: Sequence[Tensor]
    ) -> Tensor:
        """Run the branch on a piece; the result has the piece's shape."""
        ...


class Cut(Protocol):
    """Function that divides an input into units."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        """Lay out an input. The other arguments are those of the block's call."""
        ...


@dataclass(frozen=True, slots=True)
class _Called:
    """Common part of the layouts that call the branch itself on each piece."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    contiguous = True
    light = True

    def share(self) -> tuple[Tensor, ...]:
        """Return nothing: the pieces share no tensor."""
        return ()

    def new(self, piece: Tensor, shape: torch.Size) -> Tensor:
        """Make an empty tensor, contiguous."""
        return piece.new_empty(shape)

    def run(
        self,
        branch: Callable[..., Tensor],
        piece: Tensor,
        start: int,  # noqa: ARG002
        stop: int,  # noqa: ARG002
        shared: Sequence[Tensor],  # noqa: ARG002
    ) -> Tensor:
        """Call the branch."""
        return branch(piece, *self.args, **self.kwargs)


@dataclass(frozen=True, slots=True)
class Whole(_Called):
    """Layout of a single unit: the branch runs on the whole input."""

    units = 1
    elements = 0

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:  # noqa: ARG002
        """Return the input itself."""
        return x

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:  # noqa: ARG002
        """Write the whole tensor."""
        out.copy_(piece)

    def add(
        self,
        out: Tensor,
        start: int,  # noqa: ARG002
        stop: int,  # noqa: ARG002
        piece: Tensor,
        grid: Grid | None = None,
        sign: int = 1,
    ) -> None:
        """Add the whole tensor."""
        accumulate(out, piece, grid, sign)


@dataclass(frozen=True, slots=True)
class Tokens(_Called):
    """Layout whose units are the vectors along the last dimension."""

    units: int
    elements: int

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Return ``(tokens, C)``, a view if the input is contiguous."""
        return x.reshape(self.units, x.shape[-1])[start:stop]

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Write some rows."""
        out.view(self.units, out.shape[-1])[start:stop] = piece

    def add(
        self,
        out: Tensor,
        start: int,
        stop: int,
        piece: Tensor,
        grid: Grid | None = None,
        sign: int = 1,
    ) -> None:
        """Add to some rows."""
        with in_rows(out) as rows:
            accumulate(rows[start:stop], piece, grid, sign)


@dataclass(frozen=True, slots=True)
class Samples(_Called):
    """Layout whose units are the samples of a batch.

    It keeps the memory format of the samples, because PyTorch chooses convolution kernels by it.
    """

    units: int
    elements: int

    def new(self, piece: Tensor, shape: torch.Size) -> Tensor:
        """Make an empty tensor whose samples have the memory format of the piece's."""
        # Order of the inner dimensions in memory, such as (T, H, W, C) for channels-last.
        inner = by_stride(piece, first=1)
        return torch.empty_permuted(shape, (0, *inner), dtype=piece.dtype, device=piece.device)

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Return a view of some samples."""
        return x[start:stop]

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Write some samples."""
        out[start:stop] = piece

    def add(
        self,
        out: Tensor,
        start: int,
        stop: int,
        piece: Tensor,
        grid: Grid | None = None,
        sign: int = 1,
    ) -> None:
        """Add to some samples."""
        accumulate(out[start:stop], piece, grid, sign)


@dataclass(frozen=True, slots=True)
class ByToken:
    """Cut of a branch that treats every token independently, such as a LayerNorm and an MLP.

    The branch is called with ``(tokens, C)``.

    Attributes:
        width: elements that one token keeps alive while the branch is differentiated, roughly the
            sum of the widths of all its intermediate results.
    """

    width: int

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        """Lay out ``(..., C)`` with every vector along the last dimension as a unit."""
        return Tokens(args, kwargs, prod(x.shape[:-1]), self.width)


@dataclass(frozen=True, slots=True)
class BySample:
    """Cut of a branch that treats every sample independently: convolutions, global attention.

    A BatchNorm in training mode computes its statistics over all samples, so a branch with one is
    not cut.

    Attributes:
        growth: number of elements kept alive in the backward per element of input.
    """

    growth: float

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        """Lay out ``(B, ...)`` with every sample as a unit."""
        return Samples(args, kwargs, x.shape[0], int(self.growth * prod(x.shape[1:])))


@dataclass(frozen=True, slots=True)
class Wider:
    """Cut that counts more elements a token than another cut: `kept_beside` of the modules."""

    cut: Cut
    more: int

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        """Lay out tokens ``(..., C)``."""
        layout: Any = self.cut(x, *args, **kwargs)
        if isinstance(layout, Whole):
            return layout
        tokens = -(-prod(x.shape[:-1]) // layout.units)  # of a unit, rounded up
        wider: Layout = replace(layout, elements=layout.elements + self.more * tokens)
        return wider


def by_stride(x: Tensor, *, first: int = 0) -> list[int]:
    """Order the dimensions from `first` on by stride, the largest first."""
    return sorted(range(first, x.ndim), key=x.stride, reverse=True)


@contextmanager
def in_rows(out: Tensor) -> Iterator[Tensor]:
    """Present a tensor as rows ``(n, C)``; changes of these rows are changes of the tensor."""
    rows = out.reshape(-1, out.shape[-1])
    yield rows
    # In some memory formats no view is possible, and reshape() has made a copy.
    if rows.untyped_storage()._cdata != out.untyped_storage()._cdata:
        out.copy_(rows.view(out.shape))


@dataclass(frozen=True, slots=True)
class Places:
    """Rows of a tensor ``(rows, C)`` from which vectors are gathered, and to which they are added.

    Attributes:
        index: row of each vector, ``(..., n)``, int64. No row occurs twice, except at padding,
            where any row may stand.
        padding: ``(..., n, 1)``, true at padding; None if there is none.
    """

    index: Tensor
    padding: Tensor | None = None

    def __getitem__(self, chosen: slice) -> "Places":
        padding = None if self.padding is None else self.padding[chosen]
        return Places(self.index[chosen], padding)

    @classmethod
    def behind(cls, index: Tensor, end: int) -> "Places":
        """Make places from row numbers of which those from `end` on stand for padding."""
        return cls(index.clamp(max=end - 1), (index >= end).unsqueeze(-1))

    def take(self, x: Tensor) -> Tensor:
        """Gather the vectors, zero at padding."""
        rows = x.reshape(-1, x.shape[-1])
        # index_select is several times as fast as rows[index].
        taken = rows.index_select(0, self.index.reshape(-1)).view(*self.index.shape, -1)
        return taken if self.padding is None else taken.masked_fill(self.padding, 0)

    def add(self, out: Tensor, added: Tensor, grid: Grid | None = None, sign: int = 1) -> None:
        """Add vectors to their rows, as `accumulate` does."""
        index, values = self.index.reshape(-1), added.reshape(-1, out.shape[-1])
        padding = None if self.padding is None else self.padding.reshape(-1)
        with in_rows(out) as rows:
            dense = rows.is_contiguous() and values.is_contiguous()
            kernels = fused(rows, values) if dense else None
            if kernels is not None:
                kernels.add(rows, values, grid, sign, index, padding)
                return
            if grid is not None:
                values = grid.round(values, sign)
            elif sign < 0:
                values = -values
            if padding is not None:
                values = values.masked_fill(padding.unsqueeze(1), 0)
            if rows.device.type == "cpu":  # twice as fast as index_add_ there
                rows.scatter_add_(0, index.unsqueeze(1).expand(-1, rows.shape[1]), values)
            else:
                # A GPU adds atomically, in any order. That does no harm, since only zeros are added
                # to a row more than once, and atomic float32 additions round like others. They
                # flush subnormal numbers to zero, which the kernel above does not.
                rows.index_add_(0, index, values)
