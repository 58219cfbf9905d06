"""Figures of a run: curves of loss and mAP, timelines of detections and ground truth, diagnosis."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from re2tal.annotations import Instance
from re2tal.detection.diagnosis import ERRORS, Diagnosis, Kind, Placed

# At least 38 apart in CIELAB (matplotlib's ten default colours: 28), dark enough for a white page
# and light enough for a black one.
COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#870f96", "#0fd2f0", "#783c1e", "#ff87ff"),
    *("#878787", "#d2c30f", "#005a3c", "#4b78ff", "#e17887", "#696900", "#00d2a5", "#693c69"),
    *("#ffb478", "#e11e87", "#b4c387", "#d2b4f0"),
)
"""Colours of classes by class number; from the 21st class on they repeat, with a pattern."""
_PATTERNS = ("", "...", "xxx", "ooo", "---", "|||", "+++", "***", "OO", "\\\\\\")

_LONGEST = 40  # characters of a name in a picture


@cache
def _fonts() -> list[str]:
    """Return font families for names; each supplies characters that those before it lack."""
    there = {font.name for font in font_manager.fontManager.ttflist}
    usual = (
        *("Noto Sans", "Noto Emoji", "WenQuanYi", "IPAGothic", "Symbola", "Hiragino Sans"),
        *("PingFang", "Apple SD Gothic", "Microsoft YaHei", "Malgun", "Segoe UI Emoji"),
    )
    return ["DejaVu Sans", *sorted(name for name in there if name.startswith(usual))]


@cache
def _warn_of_fonts() -> None:
    print(
        "remark: the fonts of this machine lack characters of some names: figures show boxes "
        "instead. Install Noto's fonts (Debian: fonts-noto-cjk, fonts-noto-core)."
    )


@contextmanager
def drawn() -> Iterator[None]:
    """Context for writing figures: missing characters are reported once a process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="Glyph .* missing from font")
        yield
    lacking = [w for w in caught if "missing from font" in str(w.message)]
    for other in caught:
        if other not in lacking:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    if lacking:
        _warn_of_fonts()


def _short(name: str) -> str:
    """Shorten a name that would take up the whole figure."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def curves(
    loss: Sequence[tuple[int, float]],
    quality: Mapping[str, Sequence[tuple[int, float]]],
    *,
    validation_loss: Sequence[tuple[int, float]] = (),
    watched: Sequence[tuple[int, float]] = (),
) -> Figure:
    """Draw the loss and the mAP over the steps.

    Args:
        loss: step and training loss.
        quality: name of a curve (a tIoU threshold, or "average") to step and mAP.
        validation_loss: step and validation loss.
        watched: step and average mAP on training videos.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    style: dict[str, Any]
    steps, values = zip(*loss, strict=True)
    left.plot(steps, values, color="0.8", linewidth=1)
    left.plot(steps, _smooth(values), color=COLOURS[0], linewidth=2, label="training")
    if validation_loss:
        style = {"color": COLOURS[3], "marker": "o", "markersize": 4}
        left.plot(*zip(*validation_loss, strict=True), label="validation", **style)
        left.legend(fontsize=8)
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    for name, points in quality.items():
        average = name == "average"
        right.plot(
            *zip(*points, strict=True),
            label=name,
            marker="o",
            markersize=4 if average else 2,
            color="black" if average else None,
            linewidth=2 if average else 1,
        )
    if watched:
        style = {"color": "black", "linestyle": "--", "marker": "o", "markersize": 4}
        right.plot(*zip(*watched, strict=True), label="training videos", **style)
    right.set(xlabel="step", ylabel="validation mAP", ylim=(0, 1))
    right.legend(title="tIoU", fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _smooth(values: Sequence[float]) -> list[float]:
    smoothed, mean = [], values[0]
    for value in values:
        mean = 0.9 * mean + 0.1 * value
        smoothed.append(mean)
    return smoothed


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Detections and annotations of a video in a figure.

    Attributes:
        duration: length of the video in seconds.
        found: rows of detections, as `re2tal.detection.files.rows` makes them.
        truth: annotated instances; None without annotations.
        least: score threshold of the rows; weaker detections are not shown.
    """

    duration: float
    found: Sequence[Mapping[str, Any]]
    truth: Sequence[Instance] | None = None
    least: float = 0.0


def timelines(videos: Mapping[str, Timeline], classes: Sequence[str]) -> Figure:
    """Draw detections: one strip a video, with one lane for each class that occurs in it.

    Bars with lower scores are fainter. Annotated instances are hatched bars above the detections of
    their lane.

    Args:
        videos: videos by the titles of their strips.
        classes: class names; their order determines lanes and colours.
    """
    lanes = [_lanes(video, classes) for video in videos.values()]
    heights = [0.5 + 0.32 * max(1, len(names)) for names in lanes]
    figure = Figure(figsize=(12, 0.7 + sum(heights)), layout="constrained")
    strips = figure.subplots(len(videos), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, names, (title, video) in zip(strips, lanes, videos.items(), strict=True):
        whole = video.truth is None
        place, height = (0.0, 0.7) if whole else (0.2, 0.4)
        for row in sorted(video.found, key=lambda row: row["score"]):
            _bar(axes, names, classes, row["segment"], row["label"], place, height, row["score"])
        for instance in video.truth or ():
            segment = (instance.start, instance.end)
            _bar(axes, names, classes, segment, instance.label, -0.2, 0.3, None)
        axes.set(xlim=(0, video.duration), ylim=(max(1, len(names)) - 0.4, -0.6))
        # a $ in a name does not begin a formula
        style: dict[str, Any] = {"parse_math": False, "fontfamily": _fonts()}
        axes.set_yticks([*range(len(names))], [*map(_short, names)], **style)
        if not video.found:
            title = f"{title}: nothing was detected with a score of {video.least:.2f} or more"
        axes.set_title(title, loc="left", fontsize=10, **style)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=9, length=2)
        axes.grid(axis="x", alpha=0.3)
    strips[-1].set_xlabel("seconds")
    if any(video.truth is not None for video in videos.values()):
        handles = [
            Patch(facecolor="0.9", edgecolor="0.3", hatch="////", label="annotated"),
            Patch(facecolor="0.6", label="detected"),
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    return figure


def _lanes(video: Timeline, classes: Sequence[str]) -> list[str]:
    """List the classes that occur in a video, in the order of `classes`."""
    present = {row["label"] for row in video.found} | {i.label for i in video.truth or ()}
    return [name for name in classes if name in present]


def _bar(
    axes: Axes,
    lanes: Sequence[str],
    classes: Sequence[str],
    segment: Sequence[float],
    label: str,
    place: float,
    height: float,
    score: float | None,
) -> None:
    """Draw a segment in the lane of its class, hatched if it has no score."""
    turn, place_in_turn = divmod(classes.index(label), len(COLOURS))
    colour, pattern = to_rgb(COLOURS[place_in_turn]), _PATTERNS[turn % len(_PATTERNS)]
    start, end = segment
    style: dict[str, Any]
    if score is None:
        style = {"facecolor": (*colour, 0.25), "edgecolor": colour, "hatch": "////" + pattern}
    else:
        shown = 0.2 + 0.8 * min(1.0, max(0.0, score))
        style = {"facecolor": (*colour, shown), "edgecolor": "white", "hatch": pattern}
        style["linewidth"] = 0
    axes.barh(lanes.index(label) + place, end - start, left=start, height=height, **style)


_OF_KIND = {
    Kind.TRUE_POSITIVE: COLOURS[2],
    Kind.DOUBLE_DETECTION: COLOURS[9],
    Kind.WRONG_LABEL: COLOURS[1],
    Kind.LOCALIZATION: COLOURS[0],
    Kind.CONFUSION: COLOURS[4],
    Kind.BACKGROUND: "0.72",
}
_TITLES = {"coverage": "coverage", "length": "length", "instances": "instances in video"}
_GAP = 1.0  # between the bars of two characteristics, in bars


def pictures(diagnosis: Diagnosis) -> dict[str, Figure]:
    """Draw all figures of a diagnosis, by the names of the functions below."""
    return {
        "false_positives": false_positives(diagnosis),
        "sensitivity": sensitivity(diagnosis),
        "false_negatives": false_negatives(diagnosis),
    }


def false_positives(diagnosis: Diagnosis) -> Figure:
    """Draw the kinds of the top predictions, and the gain of mAP_N without each kind of error."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    shares = 100 * np.nan_to_num(diagnosis.false_positives.shares.mean(axis=0))  # (10, 6)
    names = [f"{group + 1}G" for group in range(len(shares))]
    below = np.zeros(len(shares))
    for kind in Kind:
        left.bar(
            names, shares[:, kind], 0.85, below, color=_OF_KIND[kind], label=_name(kind), zorder=2
        )
        below += shares[:, kind]
    left.set(ylim=(0, 100), ylabel="share of predictions (%)")
    left.set_xlabel("predictions by score, in instances of their class (G)")
    gains = 100 * diagnosis.false_positives.gains.mean(axis=0)
    bars = right.barh(
        [_name(kind) for kind in ERRORS],
        gains,
        0.7,
        color=[_OF_KIND[kind] for kind in ERRORS],
        zorder=2,
    )
    right.bar_label(bars, fmt="%.1f", fontsize=9, padding=2)
    right.set(xlabel="mAP gained without these (points)", xlim=(0, max(1.0, 1.15 * gains.max())))
    right.invert_yaxis()
    _tidy(left)
    right.grid(axis="x", alpha=0.3)
    right.spines[["top", "right"]].set_visible(False)
    right.tick_params(axis="y", length=0, labelsize=9)
    figure.legend(loc="outside upper center", ncols=len(Kind), fontsize=9, frameon=False)
    return figure


def sensitivity(diagnosis: Diagnosis) -> Figure:
    """Draw mAP_N over the bins of each characteristic, and the range relative to overall mAP_N."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    overall = 100 * float(diagnosis.mAP.mean())
    values = {name: 100 * one.average for name, one in diagnosis.sensitivity.items()}
    _bars_by_bin(left, diagnosis.placed, values)
    left.axhline(overall, color="black", linestyle="--", linewidth=1, zorder=3)
    left.set_ylabel("normalised mAP (%)")
    left.set_title(f"dashed: all instances, {overall:.1f}", fontsize=9, loc="left")
    for place, one in enumerate(diagnosis.sensitivity.values()):
        if np.isnan(one.relative).all():
            continue
        low, high = np.nanmin(one.relative), np.nanmax(one.relative)
        right.plot(
            [place, place],
            [low, high],
            color=COLOURS[place],
            linewidth=5,
            marker="_",
            markersize=16,
        )
        for value in (low, high):
            right.annotate(f"{value:.1f}", (place, value), (9, -3), textcoords="offset points")
    right.axhline(1, color="black", linestyle="--", linewidth=1)
    right.set(xlim=(-0.5, len(values) - 0.2), ylim=(0, None), ylabel="bin / all instances")
    right.set_xticks(range(len(values)), [_TITLES[name].replace(" ", "\n") for name in values])
    _tidy(right)
    return figure


def false_negatives(diagnosis: Diagnosis) -> Figure:
    """Draw the share of instances missed in each bin, and in pairs of coverage and length."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    missed = diagnosis.false_negatives
    overall = 100 * float(missed.overall.mean())
    _bars_by_bin(
        left, diagnosis.placed, {name: 100 * one.average for name, one in missed.by.items()}
    )
    left.axhline(overall, color="black", linestyle="--", linewidth=1, zorder=3)
    left.set_ylabel("instances missed (%)")
    left.set_title(f"dashed: all instances, {overall:.1f}", fontsize=9, loc="left")
    pair = missed.by_pair["coverage", "length"]
    right.imshow(100 * pair.average, cmap="Blues", vmin=0, vmax=100, aspect="auto", origin="lower")
    for (row, column), share in np.ndenumerate(100 * pair.average):
        if pair.counts[row, column]:
            text = f"{share:.0f}\n({pair.counts[row, column]})"
            colour = "white" if share > 60 else "black"
            right.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    coverage, length = (diagnosis.placed[name].bins.names for name in ("coverage", "length"))
    right.set_xticks(range(len(length)), length)
    right.set_yticks(range(len(coverage)), coverage)
    right.set(xlabel="length", ylabel="coverage")
    right.set_title("missed (%) and number of instances", fontsize=9, loc="left")
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    return figure


def _bars_by_bin(
    axes: Axes, placed: Mapping[str, Placed], values: Mapping[str, NDArray[np.float64]]
) -> None:
    """Draw a bar for each bin, grouped by characteristic; empty bins are labelled as such."""
    start, ticks, names = 0.0, [], []
    for colour, (name, heights) in zip(COLOURS, values.items(), strict=False):
        places = start + np.arange(len(heights))
        bars = axes.bar(places, np.nan_to_num(heights), 0.85, color=colour, zorder=2)
        labels = ["none" if np.isnan(height) else f"{height:.1f}" for height in heights]
        axes.bar_label(bars, labels, fontsize=9, padding=2)
        axes.annotate(
            _TITLES[name],
            (places.mean(), 0),
            (0, -24),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
            color=colour,
        )
        ticks += list(places)
        names += list(placed[name].bins.names)
        start = places[-1] + 1 + _GAP
    axes.set_xticks(ticks, names)
    highest = max(float(np.nan_to_num(heights).max()) for heights in values.values())
    axes.set_ylim(0, max(1.0, 1.12 * highest))
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0, labelsize=9)


def _name(kind: Kind) -> str:
    return kind.name.lower().replace("_", " ")
