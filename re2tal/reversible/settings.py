"""How the stages of one container run."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from re2tal.reversible.grid import Bits
from re2tal.reversible.streams import Coupling


@dataclass(frozen=True, slots=True)
class AtLeast:
    """Pieces as large as one of the stage's streams, of which a backward holds six in any case.

    Attributes:
        bytes: of the smallest; of a smaller stream a piece holds several times as much.
    """

    bytes: int


Budget = int | AtLeast | Literal["auto"] | None
"""Bytes of a piece of a branch. "auto" is `SMALLEST_PIECE` of the device. None does not cut."""

SMALLEST_PIECE = {"cpu": AtLeast(32 * 2**20), "cuda": AtLeast(2 * 2**30)}
"""By kind of device. Small pieces leave a GPU waiting for the next: on an H200, Swin-T's step on
768 frames took 2.2 s in pieces of 128 MiB, 0.4 s in pieces of 2 GiB, and 0.3 s stored."""


def bytes_of_piece(budget: int | AtLeast | Literal["auto"], stream: Tensor) -> int:
    """What a budget means for a stage with these streams."""
    if budget == "auto":
        budget = SMALLEST_PIECE.get(stream.device.type, SMALLEST_PIECE["cpu"])
    if isinstance(budget, AtLeast):
        return max(budget.bytes, stream.numel() * stream.element_size())
    return budget


TOLERANCE = 1e-3
"""Largest relative error (root mean square) of a rebuilt input that a coupling may have; above it
activations are stored. In bfloat16 a branch rounds its input by up to 4e-3 of each value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What `rewire` was asked for.

    Attributes:
        coupling: alpha and beta.
        reversible: rebuild activations (True) or store them (False); the function is the same.
        grid: fractional bits of the fixed-point grid, or "auto"; None is plain floating point.
        slice_bytes: budget of a piece of a branch; None runs branches whole, by their own code.
        verify: compare what was rebuilt with what was there.
    """

    coupling: Coupling = field(default_factory=Coupling)
    reversible: bool = True
    grid: Bits | None = None
    slice_bytes: Budget = "auto"
    verify: bool = True

    @property
    def exact(self) -> bool:
        """Whether the way back is exact to the bit."""
        return self.grid is not None and self.coupling.beta == 1

    def stored_because(self) -> str | None:
        """Why activations are stored whatever is measured; None if they may be rebuilt."""
        if not self.reversible:
            return "asked for by set_reversible"
        if not self.coupling.invertible:
            return "beta = 0 is not invertible"
        if self.grid is not None and not self.exact:
            return "exact streams need beta = 1"
        return None
