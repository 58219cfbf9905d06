"""How the stages of one container run."""

from dataclasses import dataclass, field
from typing import Literal

from re2tal.reversible.grid import Bits
from re2tal.reversible.streams import Coupling

Budget = int | Literal["auto"] | None
"""Bytes of a piece of a branch. "auto" is as much as one of the stage's streams takes, of which a
backward pass holds six in any case, but at least `SMALLEST_PIECE`. None does not cut."""

SMALLEST_PIECE = 32 * 2**20

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
