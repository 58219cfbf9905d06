"""Triton kernel that rounds to the grid and adds in place, which takes four operators elsewhere.

It computes ``out[index] += spacing * round(scale * values)`` with the bits of `coupling.Grid.add`
and `layouts.Places.add`. Each element of the target is read and written by one program, so that
nothing depends on an order; the atomic additions of `index_add_` would also flush subnormal numbers
to zero.

Importing this file imports Triton.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 8, 128
"""Tile of one program: vectors, and elements of each."""


class Points(Protocol):
    """Points of a grid, as `coupling.Grid` has them."""

    @property
    def scale(self) -> float | Tensor:
        """Number of points in an interval of length 1, a power of two."""
        ...

    @property
    def spacing(self) -> float | Tensor:
        """Distance between two points, ``1 / scale``."""
        ...


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _add(  # type: ignore[no-untyped-def]
    out,
    values,
    index,
    padding,
    scale,
    spacing,
    size,
    channels,
    SIGN: tl.constexpr,  # noqa: N803
    ROUNDS: tl.constexpr,  # noqa: N803
    LOADS: tl.constexpr,  # noqa: N803
    INDEXED: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    # int64, because the number of an element may exceed 2^31.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = row[:, None] * channels + column[None, :]
    inside = (column < channels)[None, :] & (place < size)
    target = place
    if INDEXED:
        there = row * channels < size
        target = tl.load(index + row, mask=there, other=0)[:, None] * channels + column[None, :]
        if PADDED:
            inside = inside & (tl.load(padding + row, mask=there, other=1) == 0)[:, None]
    value = tl.load(values + place, mask=inside, other=0.0)
    if ROUNDS:
        if LOADS:
            scale = tl.load(scale)
            spacing = tl.load(spacing)
        scaled = value * scale  # exact, by a power of two
        magnitude = tl.abs(scaled)
        # From 2^23 = 8388608 on every float32 is a whole number. Below, adding 2^23 rounds to one,
        # half to even as round() does, and subtracting it again is exact.
        whole = tl.where(magnitude < 8388608.0, (magnitude + 8388608.0) - 8388608.0, magnitude)
        value = tl.where(scaled < 0.0, -whole, whole) * spacing  # exact
    before = tl.load(out + target, mask=inside, other=0.0)
    after = before + value if SIGN > 0 else before - value
    tl.store(out + target, after, mask=inside)


def add(
    out: Tensor,
    values: Tensor,
    grid: Points | None,
    sign: int,
    index: Tensor | None = None,
    padding: Tensor | None = None,
) -> None:
    """Add values to a tensor in place, rounded to the grid if there is one.

    Args:
        out: float32 tensor, dense; ``(rows, channels)`` with an index.
        values: float32 values; without an index in the shape and with the strides of ``out``.
        grid: grid of ``out``; None adds the values themselves.
        sign: 1, or -1 to subtract.
        index: row of each vector of the values, contiguous. A row may occur once only.
        padding: bools, contiguous, true for vectors to leave out.
    """
    size = values.numel()
    if size == 0:
        return
    channels = _COLUMNS if index is None else out.shape[-1]
    programs = triton.cdiv(triton.cdiv(size, channels), _ROWS), triton.cdiv(channels, _COLUMNS)
    scale, spacing = (1.0, 1.0) if grid is None else (grid.scale, grid.spacing)
    with torch.cuda.device_of(out):
        _add[programs](
            out,
            values,
            out if index is None else index,
            out if padding is None else padding,
            scale,
            spacing,
            size,
            channels,
            SIGN=sign,
            ROUNDS=grid is not None,
            LOADS=isinstance(scale, Tensor),
            INDEXED=index is not None,
            PADDED=padding is not None,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
    # Autograd does not see a kernel's writes: count the in-place change as an operator would.
    torch.autograd.graph.increment_version(out)
