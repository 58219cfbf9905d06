"""A picture of when a video shows what."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]


def timeline(
    title: str, rows: Sequence[Mapping[str, Any]], duration: float, classes: Sequence[str]
) -> Figure:
    """Draws the detections of a video, a lane for each class that occurs.

    Args:
        title: of the picture.
        rows: detections as `re2tal.detection.files.rows` makes them; the lower a score, the
            fainter its bar.
        duration: of the video, in seconds.
        classes: class names, whose order gives lanes and colours.
    """
    present = {row["label"] for row in rows}
    lanes = [name for name in classes if name in present]
    figure = Figure(figsize=(12, 1.2 + 0.32 * max(1, len(lanes))), layout="constrained")
    axes = figure.subplots()
    for row in sorted(rows, key=lambda row: row["score"]):
        start, end = row["segment"]
        axes.barh(
            lanes.index(row["label"]),
            end - start,
            left=start,
            height=0.7,
            color=_COLOURS[classes.index(row["label"]) % len(_COLOURS)],
            alpha=0.2 + 0.8 * min(1.0, max(0.0, row["score"])),
        )
    axes.set(xlim=(0, duration), ylim=(max(1, len(lanes)) - 0.4, -0.6), yticks=[*range(len(lanes))])
    # names are not mathematics, whatever signs they hold
    axes.set_yticklabels(lanes, parse_math=False)
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=9, length=2)
    axes.grid(axis="x", alpha=0.3)
    if not lanes:
        axes.text(0.5, 0.5, "nothing detected", transform=axes.transAxes, ha="center", va="center")
    return figure
