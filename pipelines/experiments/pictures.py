"""Common elements of pictures: one colour per way, and names at the ends of lines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

COLOURS = {
    "plain": "#4d4d4d",
    "per-block checkpointing": "#2b7bba",
    "naive reversible": "#d98a1f",
    "ours": "#c2182b",
    "ours, float": "#8a5fbf",
}
"""Colour of each way to train, by its title."""

_GAP = 0.06  # least distance between the middles of two names, as a share of the axes' height
_BOLD = ("ours:", "ours, on the grid")
_BESIDE = 0.26  # distance from the axes to the names, in inches


@dataclass(frozen=True, slots=True)
class End:
    """Last point of a line.

    Attributes:
        x: horizontal position in the axes' data.
        y: vertical position in the axes' data.
        text: name of the line.
        colour: colour of the line.
    """

    x: float
    y: float
    text: str
    colour: str


def tidy(axes: Axes) -> None:
    """Remove the upper and right frame lines, and draw a light grid behind the data."""
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def lines(
    axes: Axes,
    x: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    *,
    unit: str,
    at_least: float = 0,
) -> None:
    """Draw a line for each way, on axes from zero, with name and last value at the line's end.

    Args:
        axes: axes to draw on.
        x: horizontal positions of the values, in ascending order.
        curves: values by the titles of the ways.
        unit: unit of the values.
        at_least: value that the vertical axis must reach.
    """
    highest = max(at_least, *map(max, curves.values()))
    axes.set(xlim=(0, x[-1]), xticks=[0, *x], ylim=(0, 1.06 * highest))
    ends = []
    for title, values in curves.items():
        colour, width = COLOURS[title], 2.6 if title == "ours" else 1.6
        axes.plot(x, values, "o-", color=colour, linewidth=width, markersize=4, clip_on=False)
        ends.append(End(x[-1], values[-1], f"{title}: {values[-1]:.3g} {unit}", colour))
    tidy(axes)
    label_ends(axes, ends)


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Write the names of lines to the right of the axes, each at the height of its line's end.

    Names that would overlap are moved apart, and connected to their ends by thin lines.

    Args:
        axes: axes with their final limits and scales.
        ends: ends of the lines.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    beside = axes.transAxes + ScaledTranslation(_BESIDE, 0, figure.dpi_scale_trans)
    inverse = axes.transAxes.inverted()
    points = [inverse.transform(axes.transData.transform((end.x, end.y))) for end in ends]
    order = sorted(range(len(ends)), key=lambda i: points[i][1])
    heights = apart([float(points[i][1]) for i in order], _GAP)
    for i, height in zip(order, heights, strict=True):
        axes.annotate(
            ends[i].text,
            xy=tuple(points[i]),
            xytext=(1, height),
            xycoords="axes fraction",
            textcoords=beside,
            color=ends[i].colour,
            fontweight="bold" if ends[i].text.startswith(_BOLD) else "normal",
            verticalalignment="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": ends[i].colour,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
            },
        )


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights at least a gap apart, with the least squared movement."""
    # isotonic regression of the heights minus the gaps below them, by pooling adjacent violators
    groups: list[list[float]] = []
    for i, height in enumerate(heights):
        groups.append([height - i * gap])
        while len(groups) > 1 and mean(groups[-2]) > mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    pooled = [mean(group) for group in groups for _ in group]
    return [height + i * gap for i, height in enumerate(pooled)]
