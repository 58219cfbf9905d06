"""Sliding-window evaluation of a detector over the validation videos, shared by the workers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.core.metric_names import safe_names
from pipelines.data.batches import Batch, Video
from re2tal.detection.evaluation import Compared, Result, evaluate
from re2tal.detection.segments import Detections
from re2tal.detector import Detector
from re2tal.inference import window_detections
from re2tal.videos.windows import Window, WindowConfig, sliding_windows


def gather(value: Any) -> list[Any]:
    """Collect one picklable value from every worker, by rank; without workers, just this one's."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def validation_share(
    videos: Sequence[Video],
    classes: Sequence[str],
    config: WindowConfig,
    *,
    stride: int,
    rank: int,
    world_size: int,
) -> list[Window]:
    """Return the sliding windows of this worker's videos: every world_size-th, from rank on.

    Args:
        videos: all validation videos.
        classes: class names.
        config: length and overlap of windows.
        stride: frames per feature of the backbone.
        rank: rank of this worker.
        world_size: number of workers.
    """
    mine = videos[rank::world_size]
    return [w for v in mine for w in sliding_windows(v.annotation, classes, config, stride=stride)]


class MeanLoss:
    """Mean loss of windows, over the batches that were added.

    Attributes:
        total: sum of the windows' losses, each the mean of its batch.
        windows: number of windows.
    """

    def __init__(self) -> None:
        self.total, self.windows = 0.0, 0

    def add(self, terms: Mapping[str, Tensor], *, windows: int) -> None:
        """Add the loss terms of a batch of some windows."""
        self.total += windows * float(torch.stack(list(terms.values())).sum())
        self.windows += windows

    def gathered(self) -> float | None:
        """Return the mean over all workers, each of which calls this; None without windows."""
        shares = gather((self.total, self.windows))
        windows = sum(share[1] for share in shares)
        return sum(share[0] for share in shares) / windows if windows else None


@torch.inference_mode()
def detect_windows(
    detector: Detector[Any, Any],
    batches: Iterable[Batch],
    durations: Mapping[str, float],
    *,
    loss: MeanLoss | None = None,
) -> tuple[dict[str, Detections], dict[str, str]]:
    """Run a detector over windows and concatenate the detections of each video.

    Args:
        detector: detector in evaluation mode.
        batches: windows; those of one video may lie in several batches.
        durations: seconds by video id.
        loss: mean to which the losses of the windows are added, from the same features.

    Returns:
        Detections of all windows by video id, in seconds and before non-maximum suppression;
        reason by video id, where decoding failed.
    """
    device = next(detector.parameters()).device
    found: dict[str, list[Detections]] = defaultdict(list)
    failures: dict[str, str] = {}
    for batch in batches:
        failures |= batch.failures
        features = detector.features(batch.frames.to(device))
        mask = detector.feature_mask(batch.mask.to(device))
        predicted = detector.localizer.predict(features, mask)
        raw = detector.localizer.decode(predicted)
        if loss is not None:
            targets = [target.to(device) for target in batch.targets]
            loss.add(detector.localizer.losses(predicted, targets), windows=len(batch.windows))
        for window, detections in zip(batch.windows, raw, strict=True):
            seconds = window_detections(detections, window, durations[window.video_id])
            found[window.video_id].append(seconds)
    return {video_id: Detections.concat(parts) for video_id, parts in found.items()}, failures


def ground_truth(videos: Sequence[Video], classes: Sequence[str]) -> dict[str, Detections]:
    """Return the annotated instances of videos as published, in seconds, each with score 1.

    Labels are indices into `classes`.
    """
    index = {name: i for i, name in enumerate(classes)}
    return {
        video.annotation.video_id: Detections(
            # float64: for a tIoU that lies on a threshold, the last digit decides
            segments=torch.tensor(
                [[i.start, i.end] for i in video.annotation.evaluated], dtype=torch.float64
            ).reshape(-1, 2),
            scores=torch.ones(len(video.annotation.evaluated)),
            labels=torch.tensor(
                [index[i.label] for i in video.annotation.evaluated], dtype=torch.int64
            ),
        )
        for video in videos
    }


def compare(
    detections: Mapping[str, Detections],
    videos: Sequence[Video],
    classes: Sequence[str],
    thresholds: Sequence[float],
    *,
    proposals: Mapping[str, Detections] | None = None,
    ignore_ambiguous: bool = False,
    ks: Sequence[int] = (),
) -> dict[str, Result]:
    """Compare detections in seconds, by video id, with the annotations; see `METRICS`.

    Args:
        detections: detections by video id.
        videos: annotated videos.
        classes: class names.
        thresholds: tIoU thresholds.
        proposals: detections before an external classifier assigned their classes.
        ignore_ambiguous: see `Recipe`.
        ks: each k of Recall@kx.
    """
    ambiguous = {
        video.annotation.video_id: torch.tensor(
            [[i.start, i.end] for i in video.annotation.ambiguous], dtype=torch.float64
        ).reshape(-1, 2)
        for video in videos
    }
    return evaluate(
        Compared(
            truth=ground_truth(videos, classes),
            predictions=detections,
            proposals=proposals,
            num_classes=len(classes),
            thresholds=thresholds,
            ambiguous=ambiguous if ignore_ambiguous else None,
            ks=ks,
        )
    )


def watched_videos(
    training: Sequence[Video], validation: Sequence[Video], most: int
) -> tuple[Video, ...]:
    """Choose training videos whose mAP is compared with that of the validation videos.

    They are spread evenly over the training videos that show an action and are not also validation
    videos.

    Args:
        training: training videos.
        validation: validation videos; no more training videos than these are chosen.
        most: greatest number of videos.
    """
    others = {video.annotation.video_id for video in validation}
    usable = [
        video
        for video in training
        if video.annotation.evaluated and video.annotation.video_id not in others
    ]
    count = min(most, len(validation), len(usable))
    return tuple(usable[i * len(usable) // count] for i in range(count))


OVERFITS = 0.15, 0.7
"""A detector overfits if its mAP on training videos exceeds that on validation videos by at least
the first value, and validation mAP is at most the second times training mAP."""


def overfitting(training: float | None, validation: float) -> str:
    """Return a sentence if a detector overfits, else an empty string; see `OVERFITS`.

    Args:
        training: mAP on training videos, if it was measured.
        validation: mAP on validation videos.
    """
    difference, ratio = OVERFITS
    if training is None or training - validation < difference or validation > ratio * training:
        return ""
    return f"overfits: {training:.2f} on training videos, {validation:.2f} on validation"


def metrics_of(results: Mapping[str, Result], classes: Sequence[str]) -> dict[str, float]:
    """Name the numbers of an evaluation for MLflow: `val/mAP`, `val/AP/<class>`, ...

    Names of classes are changed where MLflow does not accept them (`safe_names`).
    """
    names = safe_names(classes)
    return {
        f"val/{name}": value
        for result in results.values()
        for name, value in result.metrics(names).items()
    }
