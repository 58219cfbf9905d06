"""Pictures of the experiment `memory`."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from re2tal.memory.ways import TITLES
from pipelines.experiments.drawing import COLOURS, lines, tidy
from pipelines.experiments.memory_numbers import Numbers, in_gib, last

_PEAK = "predicted peak of a step, GiB"
_BELOW = "naive"  # whose number stands below its dot, for it is close to checkpointing's


def over_frames(found: Numbers, title: str) -> Figure:
    """Draws memory against frames, and the longest clip that fits the memory of each GPU.

    Args:
        found: the numbers.
        title: of the picture.
    """
    figure, left, right = _two_panels(title)
    curves = {TITLES[way]: in_gib(result["frames"]) for way, result in found.close.items()}
    near = [card for card in found.cards if card < 2 * max(map(max, curves.values()))]
    _gpus(left, near)
    left.set(xlabel="frames of the clip", ylabel=_PEAK)
    left.set_title("Memory of a training step", loc="left", fontweight="bold")
    lines(left, found.frames, curves, unit="GiB", at_least=max(near, default=0))
    _fitting(right, found)
    return figure


def over_depth(found: Numbers, title: str) -> Figure:
    """Draws memory against depth, and of all backbones.

    Args:
        found: the numbers.
        title: of the picture.
    """
    figure, left, right = _two_panels(title)
    left.set(xlabel=f"blocks of the deepest stage of {found.backbone}", ylabel=_PEAK)
    curves = {TITLES[way]: in_gib(result["depths"]) for way, result in found.close.items()}
    left.set_title("Memory against depth", loc="left", fontweight="bold")
    lines(left, found.depths, curves, unit="GiB")
    _bars(right, found)
    return figure


def _two_panels(title: str) -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=10, color="0.35")
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    return figure, left, right


def _gpus(axes: Axes, cards: Sequence[float]) -> None:
    """A thin line at the memory of each GPU."""
    for card in cards:
        axes.axhline(card, color="0.6", linewidth=0.9, linestyle=(0, (5, 3)))
        axes.annotate(
            f"a GPU of {card:g} GiB",
            (0, card),
            xytext=(5, 2),
            textcoords="offset points",
            fontsize=8,
            color="0.4",
        )


def _fitting(axes: Axes, found: Numbers) -> None:
    """A row for each GPU, in it a dot for each way at the longest clip that fits."""
    for row in range(len(found.cards)):
        fits = {way: r["fits"][row] for way, r in found.close.items() if r["fits"][row]}
        axes.plot([min(fits.values()), max(fits.values())], [row, row], color="0.8", zorder=1)
        for way, frames in fits.items():
            ours = way == "ours"
            colour = COLOURS[TITLES[way]]
            axes.plot(frames, row, "o", color=colour, markersize=9 if ours else 6)
            axes.annotate(
                f"{frames:,}",
                (frames, row),
                xytext=(0, -16 if way == _BELOW else 8),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=colour,
                fontweight="bold" if ours else "normal",
            )
    rows = range(len(found.cards))
    axes.set_title("Longest clip that fits a GPU", loc="left", fontweight="bold")
    axes.set(xscale="log", xlabel="frames")
    axes.set(yticks=rows, yticklabels=[f"{card:g} GiB" for card in found.cards])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda n, _: f"{n / 1000:g}k" if n >= 1000 else f"{n:g}")
    tidy(axes)
    axes.grid(visible=False, axis="y")


def _bars(axes: Axes, found: Numbers) -> None:
    """For each backbone a bar for each way."""
    for row, way in enumerate(found.close):
        title = TITLES[way]
        values = in_gib([last(ways[way]) for ways in found.backbones.values()])
        places = [place + 0.21 * (row - 1.5) for place in range(len(values))]
        bars = axes.barh(places, values, 0.19, color=COLOURS[title])
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8, color=COLOURS[title])
    axes.set_title("Memory of other backbones", loc="left", fontweight="bold")
    axes.set(yticks=range(len(found.backbones)), yticklabels=list(found.backbones), xlabel=_PEAK)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    tidy(axes)
    axes.grid(visible=False, axis="y")
