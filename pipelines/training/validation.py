"""Sliding-window evaluation of a detector over the validation videos, shared by the workers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

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
    """Return the sliding windows of every world_size-th video, from the rank-th on.

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


@torch.inference_mode()
def detect_windows(
    detector: Detector[Any, Any], batches: Iterable[Batch], durations: Mapping[str, float]
) -> tuple[dict[str, Detections], dict[str, str]]:
    """Run a detector over windows and put those of each video together.

    Args:
        detector: detector in evaluation mode.
        batches: windows; those of one video may lie in several batches.
        durations: seconds by video id.

    Returns:
        Detections of all windows by video id, in seconds and before non-maximum suppression;
        reasons by video id where decoding failed.
    """
    device = next(detector.parameters()).device
    found: dict[str, list[Detections]] = defaultdict(list)
    failures: dict[str, str] = {}
    for batch in batches:
        failures |= batch.failures
        raw = detector(batch.frames.to(device), batch.mask.to(device))
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
            # float64: overlaps that lie on a threshold are decided by the last digit
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
        proposals: detections before an external classifier named their classes.
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


def metrics_of(results: Mapping[str, Result], classes: Sequence[str]) -> dict[str, float]:
    """Name the numbers of an evaluation for MLflow: `val/mAP`, `val/AP/<class>`, ...

    Classes are named as MLflow takes them (`safe_names`).
    """
    names = safe_names(classes)
    return {
        f"val/{name}": value
        for result in results.values()
        for name, value in result.metrics(names).items()
    }
