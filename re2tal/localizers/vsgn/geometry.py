"""Which features lie behind a node of the pyramid, and which part of a stitched window it is in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def zero_padding(x: Tensor, valid: Tensor) -> Tensor:
    """Finite `x` `(B, C, N)` with zeros where `valid` `(B, N)` is false."""
    return x * valid[:, None].to(x.dtype)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Of `x` `(B, N, C)` the rows `index` `(B, M)`: `(B, M, C)`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """The N nodes of one level, each of which stands for a cell of `T / N` features in a row.

    Attributes:
        valid: `(B, N)` bool, whether any feature of the cell is no padding.
        parts: `(B, N)` int64, in which run of valid features the cell ends, from 0 on.
        stitched: `(B,)` bool, whether the sample has several such runs: a clip and, behind a gap,
            its magnified copy (Zhao et al., ICCV 2021, section 3.2).
    """

    valid: Tensor
    parts: Tensor
    stitched: Tensor

    @staticmethod
    def of(mask: Tensor, stride: int) -> Nodes:
        """The nodes of a level whose cells hold `stride` features.

        Args:
            mask: `(B, T)` bool, T a multiple of `stride`.
            stride: features in a cell.
        """
        rising = mask.clone()
        rising[:, 1:] &= ~mask[:, :-1]
        runs = rising.cumsum(dim=1)
        return Nodes(
            valid=mask.unflatten(1, (-1, stride)).any(dim=2),
            parts=runs[:, stride - 1 :: stride] - 1,
            stitched=runs[:, -1] > 1,
        )
