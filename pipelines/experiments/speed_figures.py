"""Pictures of the experiment `speed`."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from pipelines.experiments.drawing import COLOURS, lines, tidy
from pipelines.experiments.speed_numbers import PEAK
from pipelines.experiments.benchmarking import Row


def ratios(tables: Mapping[str, Sequence[Row]]) -> Figure:
    """Draws times relative to plain training, with their quartiles.

    Args:
        tables: by step.
    """
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    panels = figure.subplots(1, len(tables), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (step, rows) in zip(panels, tables.items(), strict=True):
        for place, row in enumerate(rows):
            colour, middle = COLOURS[row["training"]], row["of plain"]
            sides = [[middle - row["lower quartile"]], [row["upper quartile"] - middle]]
            axes.errorbar(middle, place, xerr=sides, fmt="o", color=colour, capsize=3, markersize=7)
            axes.annotate(
                f"{middle:.2f}",
                (middle, place),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=colour,
            )
        axes.set_title(step, fontsize=10)
        axes.set_xlabel("time of a step, relative to plain training")
        tidy(axes)
    names = [row["training"] for row in next(iter(tables.values()))]
    panels[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.7))
    return figure


def over_depth(rows: Sequence[Row]) -> Figure:
    """Draws time and memory against depth.

    Args:
        rows: one for each depth and way.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    depths = sorted({row["branches"] for row in rows})
    for axes, column, label, unit in (
        (left, "seconds", "time of a step, seconds", "s"),
        (right, PEAK, "peak of a step, MB", "MB"),
    ):
        curves: dict[str, list[float]] = {}
        for row in rows:
            curves.setdefault(row["training"], []).append(row[column])
        lines(axes, depths, curves, unit=unit)
        axes.set(xlabel="residual branches", ylabel=label)
    return figure
