"""Layouts of a worker's step: passes, pieces, what is stored; and the choice of one that fits.

A step keeps its windows (`scale.workers` x `optim.accumulation` x `batch_size`), their frames and
pixels, and its learning rates. A rewired network stays rewired: where there is memory, its
activations are stored, which computes the same. A network that is not rewired becomes so only if it
does not fit otherwise, since its function is then another one.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from re2tal.memory.fit import GIBIBYTE
from re2tal.reversible.coupling import SMALLEST_PIECE

if TYPE_CHECKING:
    from pipelines.config.recipe import Recipe

AGAIN = 1.13
"""Time of a step that computes its branches twice, with no piece waited for, against a step that
stores their activations: on an H200 0.34 of 0.30 s, for Swin-T on 768 frames in pieces of 4 GiB."""

LAUNCH = {"cuda": int(0.9 * GIBIBYTE), "cpu": 2**23}
"""Activations that a device computes in the time in which it is told of one piece, in bytes. The
same Swin-T took 2.2, 0.59, 0.39 and 0.34 s in pieces of 0.125, 0.5, 2 and 4 GiB, of 40 GiB in all;
as the root of the sum of squares this is estimated as 2.2, 0.64, 0.36 and 0.35."""

_SMALLER = 4  # times that a piece is halved


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Layout of a worker's step.

    Attributes:
        batch: windows of a pass.
        passes: passes of a step.
        reversible: the backbone is rewired.
        stored: its activations are stored nevertheless.
        slice_mb: see `BackboneModelConfig`.
    """

    batch: int
    passes: int
    reversible: bool
    stored: bool = False
    slice_mb: int | None = None

    def applied(self, recipe: Recipe) -> Recipe:
        """Lay a recipe's step out in this way."""
        model = replace(
            recipe.model,
            reversible=self.reversible,
            stored=self.stored,
            slice_mb=self.slice_mb,
        )
        optim = replace(recipe.optim, accumulation=self.passes)
        return replace(recipe, batch_size=self.batch, optim=optim, model=model)

    def options(self, recipe: Recipe) -> dict[str, str]:
        """Name the options that ask for it explicitly, and their values; flags have ""."""
        found = {"--batch-size": f"{self.batch}", "--optim.accumulation": f"{self.passes}"}
        for name in ("reversible", "stored"):
            if (value := getattr(self, name)) != getattr(recipe.model, name):
                found[f"--model.{'' if value else 'no-'}{name}"] = ""
        if self.slice_mb != recipe.model.slice_mb:
            found["--model.slice-mb"] = f"{self.slice_mb}"
        return found

    def title(self, device: str) -> str:
        """Name the way in a table."""
        if self.stored:
            return "rewired, stored"
        if not self.reversible:
            return "not rewired"
        return f"reversible, pieces of {mebibytes(self.piece(device))}"

    def piece(self, device: str) -> int:
        """Bytes of a piece, or of the smallest where a large stream makes them larger."""
        return SMALLEST_PIECE[device].bytes if self.slice_mb is None else self.slice_mb * 2**20

    def within(self, other: Layout, device: str) -> bool:
        """Tell whether its passes need no more than another's: a way with less in it at a time."""
        return (
            (self.reversible, self.stored) == (other.reversible, other.stored)
            and self.batch <= other.batch
            and self.piece(device) <= other.piece(device)
        )


def layouts(recipe: Recipe, *, split: bool) -> list[Layout]:
    """List all layouts of a worker's step that a recipe may have.

    Args:
        recipe: the recipe. Its own pieces are the largest if it names them.
        split: let a pass have another number of windows than the recipe's.
    """
    windows = recipe.batch_size * recipe.optim.accumulation
    batches = [b for b in range(1, windows + 1) if windows % b == 0] if split else []
    own = recipe.model.slice_mb
    default = SMALLEST_PIECE["cuda" if recipe.scale.gpu else "cpu"].bytes // 2**20
    smaller = (mb for k in range(1, _SMALLER + 1) if (mb := default // 2**k))
    ladder = [own, *(mb for mb in smaller if own is None or mb < own)]
    ways: list[dict[str, Any]] = [{"reversible": True, "slice_mb": mb} for mb in ladder]
    if recipe.model.reversible:
        ways.append({"reversible": True, "stored": True, "slice_mb": own})
    else:
        ways.append({"reversible": False})
    return [
        Layout(batch=batch, passes=windows // batch, **way)
        for batch in batches or [recipe.batch_size]
        for way in ways
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Predicted bytes of a step on its device.

    Attributes:
        state: parameters, buffers, gradients (twice where DDP gathers them), the two moments of
            AdamW and the moving average.
        activations: everything else that a step holds, frames included.
        margin: addition for what cannot be predicted.
        earlier: part of these that only the gradients of earlier passes of the step make up; a
            single pass has none.
    """

    state: int
    activations: int
    margin: int
    earlier: int = 0

    @property
    def peak(self) -> int:
        """Bytes of the process on its GPU."""
        return self.state + self.activations + self.margin


@dataclass(frozen=True, kw_only=True, slots=True)
class Considered:
    """A layout that was considered.

    Attributes:
        needs: its needs; None where a smaller one did not fit already.
        time: estimate, where a step that stores its activations and is laid out in one pass has
            about 1.
        fits: it fits.
    """

    layout: Layout
    needs: Needs | None
    time: float
    fits: bool


def choose(
    candidates: Sequence[tuple[Layout, float]],
    needs: Callable[[Layout], Needs],
    budget: int,
    *,
    device: str,
) -> list[Considered]:
    """Find the first layout that fits, with few predictions.

    Args:
        candidates: layouts and their times, in the order in which they are preferred.
        needs: prediction. Without `earlier` it must not be smaller for a larger batch or piece of
            the same way.
        budget: bytes of the GPU.
        device: "cuda" or "cpu".

    Returns:
        All that were considered, in the order given. The first that fits is the choice; none fits
        only if no layout does.
    """
    found: dict[Layout, Considered] = {}
    times = dict(candidates)

    def too_large(layout: Layout) -> bool:
        return any(
            one.needs is not None
            and one.needs.peak - one.needs.earlier > budget
            and one.layout.within(layout, device)
            for one in found.values()
        )

    def look(layout: Layout) -> bool:
        if layout not in found:
            need = None if too_large(layout) else needs(layout)
            fits = need is not None and need.peak <= budget
            found[layout] = Considered(layout=layout, needs=need, time=times[layout], fits=fits)
        return found[layout].fits

    for layout in times:
        within = [other for other in times if other.within(layout, device)]
        pieces = [other for other in within if other.batch == layout.batch]
        batches = [other for other in within if other.piece(device) == layout.piece(device)]
        # the smallest batch is soon predicted, and rules the larger ones out if it does not fit
        small = too_large(layout) or look(min(batches, key=lambda other: other.batch))
        if look(layout):
            break
        if small:  # so do the smallest pieces
            look(min(pieces, key=lambda other: other.piece(device)))
    return [found[layout] for layout in times if layout in found]


def in_order(
    recipe: Recipe, found: Sequence[Layout], *, per_window: int, branches: int
) -> list[tuple[Layout, float]]:
    """Order layouts by the time that a step is estimated to take; other functions come last.

    Args:
        recipe: the recipe.
        found: its layouts.
        per_window: bytes of activations of a window where they are stored.
        branches: number of branches of the backbone.
    """
    device = "cuda" if recipe.scale.gpu else "cpu"
    launch = LAUNCH[device]
    windows = recipe.batch_size * recipe.optim.accumulation
    whole = math.hypot(windows * per_window, branches * launch)

    def time(layout: Layout) -> float:
        rebuilt = layout.reversible and not layout.stored
        pieces = branches
        if rebuilt:
            pieces = max(branches, math.ceil(layout.batch * per_window / layout.piece(device)))
        factor = AGAIN if rebuilt else 1.0
        return math.hypot(factor * windows * per_window, layout.passes * pieces * launch) / max(
            1, whole
        )

    def order(one: tuple[Layout, float]) -> Any:
        layout, seconds = one
        another = layout.reversible != recipe.model.reversible
        return another, seconds, -layout.batch, -layout.piece(device)

    return sorted(((layout, time(layout)) for layout in found), key=order)


def explicit_command(
    script: Sequence[str], arguments: Sequence[str], layout: Layout, asked: Recipe
) -> str:
    """Write the command that asks for a chosen layout without `--fit`.

    Args:
        script: beginning of the command.
        arguments: the recipe's name and options, `--fit` among them.
        layout: the choice.
        asked: the recipe that these name.
    """
    chosen = layout.options(asked)
    options = [word for pair in chosen.items() for word in pair if word]
    replaced = {re.sub(r"^--(.*\.)?no-", r"--\1", name) for name in chosen} | {"--fit"}
    return shlex.join([*script, *without(arguments, replaced), *options])


def without(arguments: Sequence[str], options: set[str]) -> list[str]:
    """Leave options with their values out of a command line."""
    kept: list[str] = []
    skipping = False
    for word in arguments:
        if word.startswith("--"):
            name = word.partition("=")[0].replace("_", "-")
            skipping = re.sub(r"^--(.*\.)?no-", r"--\1", name) in options
        if not skipping:
            kept.append(word)
    return kept


def mebibytes(size: int) -> str:
    """Format a number of bytes."""
    if size >= GIBIBYTE and size % GIBIBYTE == 0:
        return f"{size // GIBIBYTE} GiB"
    return f"{size / 2**20:.4g} MiB"
