"""Layouts of a worker's step: passes, pieces, what is stored; and the choice of one that fits.

A step keeps its windows (`scale.workers` x `optim.accumulation` x `batch_size`), their frames and
pixels, and its learning rates. A rewired network stays rewired: if memory allows, its activations
are stored, which computes the same function. A network that is not rewired is rewired only if it
fits in no other way, because rewiring changes its function.
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
"""Ratio of the time of a step that computes its branches twice, without waiting for the launch of a
piece, to that of a step that stores their activations: 0.34 s and 0.30 s on an H200, for Swin-T on
768 frames in pieces of 4 GiB."""

LAUNCH = {"cuda": int(0.9 * GIBIBYTE), "cpu": 2**23}
"""Bytes of activations that a device computes in the time that the launch of one piece takes.

The same Swin-T took 2.2, 0.59, 0.39 and 0.34 s in pieces of 0.125, 0.5, 2 and 4 GiB, of 40 GiB in
all. The estimate, the root of the sum of squares of computing and launching (`in_order`), gives
2.2, 0.64, 0.36 and 0.35 s."""

_SMALLER = 4  # number of times that a piece may be halved


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Layout of a worker's step.

    Attributes:
        batch: windows of a pass.
        passes: passes of a step.
        reversible: the backbone is rewired.
        stored: the activations of the rewired backbone are stored, not rebuilt.
        slice_mb: see `BackboneModelConfig`.
    """

    batch: int
    passes: int
    reversible: bool
    stored: bool = False
    slice_mb: int | None = None

    def applied(self, recipe: Recipe) -> Recipe:
        """Return a recipe with its step laid out in this way."""
        model = replace(
            recipe.model,
            reversible=self.reversible,
            stored=self.stored,
            slice_mb=self.slice_mb,
        )
        optim = replace(recipe.optim, accumulation=self.passes)
        return replace(recipe, batch_size=self.batch, optim=optim, model=model)

    def options(self, recipe: Recipe) -> dict[str, str]:
        """Return the options that request this layout, with their values; "" for flags."""
        found = {"--batch-size": f"{self.batch}", "--optim.accumulation": f"{self.passes}"}
        for name in ("reversible", "stored"):
            if (value := getattr(self, name)) != getattr(recipe.model, name):
                found[f"--model.{'' if value else 'no-'}{name}"] = ""
        if self.slice_mb != recipe.model.slice_mb:
            found["--model.slice-mb"] = f"{self.slice_mb}"
        return found

    def title(self, device: str) -> str:
        """Return the name of the layout in tables."""
        if self.stored:
            return "rewired, stored"
        if not self.reversible:
            return "not rewired"
        return f"reversible, pieces of {mebibytes(self.piece(device))}"

    def piece(self, device: str) -> int:
        """Return the bytes of a piece; of the smallest where large streams make pieces larger."""
        return SMALLEST_PIECE[device].bytes if self.slice_mb is None else self.slice_mb * 2**20

    def within(self, other: Layout, device: str) -> bool:
        """Tell whether its passes need no more memory: same way, no larger batch or piece."""
        return (
            (self.reversible, self.stored) == (other.reversible, other.stored)
            and self.batch <= other.batch
            and self.piece(device) <= other.piece(device)
        )


def layouts(recipe: Recipe, *, split: bool) -> list[Layout]:
    """List all layouts of a worker's step that a recipe may have.

    Args:
        recipe: the recipe. Its own pieces are the largest if it names them.
        split: true if a pass may have another number of windows than the recipe's batch.
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
        earlier: part of these that accumulated gradients of the step's earlier passes take; 0 for a
            single pass.
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
    """Layout that was considered.

    Attributes:
        needs: predicted needs; None if a smaller layout was already too large.
        time: estimated time of a step; about 1 for stored activations in one pass.
        fits: true if it fits.
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
        needs: function that predicts the needs of a layout. Without `earlier` they must not be
            smaller for a larger batch or piece of the same way.
        budget: bytes of the GPU.
        device: "cuda" or "cpu".

    Returns:
        All layouts that were considered, in the order given. The first that fits is the choice. If
        none of them fits, no candidate does.
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
        # the smallest batch is the quickest to predict; if it does not fit, larger ones do not
        small = too_large(layout) or look(min(batches, key=lambda other: other.batch))
        if look(layout):
            break
        if small:  # likewise the smallest piece
            look(min(pieces, key=lambda other: other.piece(device)))
    return [found[layout] for layout in times if layout in found]


def in_order(
    recipe: Recipe, found: Sequence[Layout], *, per_window: int, branches: int
) -> list[tuple[Layout, float]]:
    """Order layouts by the estimated time of a step; those that change the function come last.

    The estimate is sqrt((f * activations)^2 + (passes * pieces * launch)^2), relative to stored
    activations in one pass. f is `AGAIN` if activations are rebuilt, else 1.

    Args:
        recipe: the recipe.
        found: its layouts.
        per_window: bytes of a window's activations when they are stored.
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
        asked: recipe that the arguments describe.
    """
    chosen = layout.options(asked)
    options = [word for pair in chosen.items() for word in pair if word]
    replaced = {re.sub(r"^--(.*\.)?no-", r"--\1", name) for name in chosen} | {"--fit"}
    return shlex.join([*script, *without(arguments, replaced), *options])


def without(arguments: Sequence[str], options: set[str]) -> list[str]:
    """Remove options and their values from a command line."""
    kept: list[str] = []
    skipping = False
    for word in arguments:
        if word.startswith("--"):
            name = word.partition("=")[0].replace("_", "-")
            # --model.stored and --model.no-stored are one option
            skipping = re.sub(r"^--(.*\.)?no-", r"--\1", name) in options
        if not skipping:
            kept.append(word)
    return kept


def mebibytes(size: int) -> str:
    """Format a number of bytes in MiB, or in GiB if these are whole."""
    if size >= GIBIBYTE and size % GIBIBYTE == 0:
        return f"{size // GIBIBYTE} GiB"
    return f"{size / 2**20:.4g} MiB"
