"""Pictures of a run: curves of loss and mAP, and timelines of detections against the truth."""

from collections.abc import Mapping, Sequence

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from re2tal.detection.segments import Detections

_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]


def curves(
    loss: Sequence[tuple[int, float]], quality: Mapping[str, Sequence[tuple[int, float]]]
) -> Figure:
    """Draws the training loss and the validation mAP over the steps.

    Args:
        loss: step and loss.
        quality: name of a curve (a tIoU threshold, or "average") to step and mAP.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, values = zip(*loss, strict=True)
    left.plot(steps, values, color="0.8", linewidth=1)
    left.plot(steps, _smooth(values), color=_COLOURS[0], linewidth=2)
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
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
    right.set(xlabel="step", ylabel="validation mAP", ylim=(0, 1))
    right.legend(title="tIoU", fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _smooth(values: Sequence[float], decay: float = 0.9) -> list[float]:
    smoothed, mean = [], values[0]
    for value in values:
        mean = decay * mean + (1 - decay) * value
        smoothed.append(mean)
    return smoothed


def timelines(
    videos: Mapping[str, tuple[float, Detections, Detections]],
    classes: Sequence[str],
    *,
    min_score: float = 0.2,
) -> Figure:
    """Draws ground truth above detections, a strip a video.

    Args:
        videos: name to duration in seconds, ground truth and detections in seconds.
        classes: class names.
        min_score: weaker detections are left out; the lower a score, the fainter its bar.
    """
    figure = Figure(figsize=(12, 1 + 1.1 * len(videos)), layout="constrained")
    strips = figure.subplots(len(videos), 1, squeeze=False)[:, 0]
    for axes, (name, (duration, truth, found)) in zip(strips, videos.items(), strict=True):
        _bars(axes, truth, row=1, opacity=torch.ones_like(truth.scores))
        strong = found.scores >= min_score
        shown = Detections(
            segments=found.segments[strong],
            scores=found.scores[strong],
            labels=found.labels[strong],
        )
        _bars(axes, shown, row=0, opacity=0.3 + 0.7 * shown.scores)
        axes.set(
            xlim=(0, duration), ylim=(-0.5, 1.5), yticks=[0, 1], yticklabels=["detected", "true"]
        )
        axes.set_title(name, loc="left", fontsize=9)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8, length=2)
    strips[-1].set_xlabel("seconds")
    handles = [
        Patch(color=_COLOURS[i % len(_COLOURS)], label=name) for i, name in enumerate(classes)
    ]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(10, len(classes)),
        fontsize=8,
        frameon=False,
    )
    return figure


def _bars(
    axes: matplotlib.axes.Axes, detections: Detections, *, row: int, opacity: torch.Tensor
) -> None:
    rows = zip(
        detections.segments.tolist(), detections.labels.tolist(), opacity.tolist(), strict=True
    )
    for (start, end), label, alpha in sorted(rows, key=lambda item: item[2]):
        colour = _COLOURS[label % len(_COLOURS)]
        axes.barh(row, end - start, left=start, height=0.7, color=colour, alpha=alpha)
