"""The picture of the experiment `exactness`."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from pipelines.experiments.drawing import COLOURS, End, label_ends, tidy
from pipelines.experiments.gradients import ERROR, FLOAT, OURS
from pipelines.experiments.benchmarking import Row

# Lines lie upon one another: each library has a mark that leaves those below it visible.
_STYLES = {
    OURS: ("o", 6, COLOURS["ours"]),
    FLOAT: ("o", 13, COLOURS["ours, float"]),
    "memcnn": ("s", 9, "#2b7bba"),
    "RevTorch": ("D", 6, "#d98a1f"),
    "revlib": ("+", 11, "#3a9a5b"),
    "minREV's form": (".", 5, "#4d4d4d"),
}


def picture(rows: Sequence[Row]) -> Figure:
    """Draws errors against depth, for each precision and library.

    Args:
        rows: of `our_errors` and `errors_of`, with numbers.
    """
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    floor = _scale(panels[0], rows)
    panels[0].set_ylabel("relative error of gradients")
    for axes, precision in zip(panels, precisions, strict=True):
        ends = _lines(axes, [row for row in rows if row["precision"] == precision], floor)
        axes.set_title(f"branches in {precision}", fontsize=10)
        if axes is panels[-1]:
            label_ends(axes, ends)
    return figure


def _scale(axes: Axes, rows: Sequence[Row]) -> float:
    """Logarithmic, with a place for zero below all that is not; returns that place."""
    errors = [row[ERROR] for row in rows if row[ERROR] > 0]
    low, high = (math.floor(math.log10(limit)) for limit in (min(errors), max(errors)))
    decades = range(low, high + 2)
    floor = 10.0 ** (low - 1.5)
    axes.set(yscale="log", ylim=(10.0 ** (low - 2), 10.0 ** (high + 1)))
    axes.set_yticks(
        [floor, *(10.0**n for n in decades)], ["exactly 0", *(f"$10^{{{n}}}$" for n in decades)]
    )
    axes.yaxis.set_minor_locator(NullLocator())
    return floor


def _lines(axes: Axes, rows: Sequence[Row], floor: float) -> list[End]:
    """A line for each library; where they end."""
    ends = []
    for library in dict.fromkeys(row["library"] for row in rows):
        mark, size, colour = _STYLES[library]
        points = [(r["branches"], r[ERROR] or floor) for r in rows if r["library"] == library]
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=mark,
            markersize=size,
            markerfacecolor=colour if library == OURS else "none",
            linewidth=2.6 if library == OURS else 1.2,
            clip_on=False,
        )
        ends.append(End(*points[-1], _label(library), colour))
    depths = sorted({row["branches"] for row in rows})
    axes.set(xscale="log", xlabel="residual branches")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.xaxis.set_minor_locator(NullLocator())
    tidy(axes)
    return ends


def _label(library: str) -> str:
    return {OURS: "ours, on the grid", FLOAT: "without the grid"}.get(library, library)
