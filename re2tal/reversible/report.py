"""What rewiring did to a model, as records and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from re2tal.reversible.streams import Coupling


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A run of consecutive blocks that became one reversible stage.

    Attributes:
        container: name of the sequential container in the model; "" is the model itself.
        blocks: names of its blocks in the container, in order.
        kind: class of the blocks.
        branches: how many residual branches the stage runs.
    """

    container: str
    blocks: tuple[str, ...]
    kind: str
    branches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A module with parameters that stays as it was.

    Attributes:
        name: its name in the model.
        kind: its class.
        reason: why it is not part of a reversible stage.
        recomputed: whether it is recomputed in the backward pass instead of stored.
    """

    name: str
    kind: str
    reason: str
    recomputed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RewireReport:
    """What `rewire` did; ``print(report)`` is a table.

    Attributes:
        coupling: alpha and beta of the stages.
        exact: whether streams are on the fixed-point grid.
        stages: what became reversible.
        left_out: what did not; of nested modules the outermost.
    """

    coupling: Coupling
    exact: bool
    stages: tuple[Stage, ...]
    left_out: tuple[LeftOut, ...]

    def __str__(self) -> str:
        rows = [("module", "class", "what became of it"), *map(_stage_row, self.stages)]
        rows += map(_left_row, self.left_out)
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        weights = f"alpha = {self.coupling.alpha:g}, beta = {self.coupling.beta:g}"
        if not self.coupling.invertible:
            return f"{weights}: not invertible, so activations are stored and no memory is saved"
        if not self.exact:
            return f"{weights}: activations are rebuilt in the backward pass, up to rounding"
        if self.coupling.beta == 1:
            return f"{weights}: activations are rebuilt in the backward pass, bit for bit"
        return f"{weights}: activations are stored, for exact streams need beta = 1"


def _left_row(left: LeftOut) -> tuple[str, str, str]:
    became = "recomputed" if left.recomputed else "as it was"
    return left.name, left.kind, f"{became}: {left.reason}"


def _stage_row(stage: Stage) -> tuple[str, str, str]:
    count = len(stage.blocks)
    became = f"reversible: {count} block{'s' * (count > 1)}, {stage.branches} branches"
    return joined(stage.container, span_of(stage.blocks)), stage.kind, became


def span_of(blocks: Sequence[str]) -> str:
    """Name of a run of blocks: of the first and the last."""
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]}…{blocks[-1]}"


def joined(container: str, name: str) -> str:
    """Name in the model of a module that a container calls ``name``."""
    return f"{container}.{name}" if container else name
