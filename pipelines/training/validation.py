"""Sliding-window evaluation of a detector over the validation videos, shared by the workers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipelines.core.metric_names import safe_names
from pipelines.data.batches import Batch, Video
from re2tal.detection.evaluation import (
    ClassRecall,
    MapResult,
    ProposalRecall,
    average_recall,
    mean_average_precision,
    recall_at,
)
from re2tal.detection.segments import Detections
from re2tal.detector import Detector
from re2tal.inference import window_detections
from re2tal.videos.windows import Window, WindowConfig, sliding_windows

PROPOSALS = (1, 5, 10, 100)
"""Numbers of proposals a video at which recall is shown."""


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


def proposal_metrics(
    proposals: Mapping[str, Detections], videos: Sequence[Video], classes: Sequence[str]
) -> dict[str, float]:
    """Measure the share of actions that proposals find, whatever their class, as ActivityNet does.

    Args:
        proposals: proposals in seconds by video id.
        videos: annotated videos.
        classes: class names.

    Returns:
        Metrics by the names of `recall_metrics`.
    """
    return recall_metrics(average_recall(ground_truth(videos, classes), proposals))


def recall_metrics(result: ProposalRecall) -> dict[str, float]:
    """Name the numbers of an evaluation of proposals for MLflow.

    Returns:
        `val/AR/<AN>`: average recall with AN proposals a video; `val/AR_AUC`, in percent.
    """
    metrics = {f"val/AR/{n}": float(result.average_recall[n - 1]) for n in PROPOSALS}
    return {**metrics, "val/AR_AUC": result.auc}


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


def map_metrics(result: MapResult, classes: Sequence[str]) -> dict[str, float]:
    """Name the numbers of an evaluation for MLflow.

    Returns:
        `val/mAP` (mean over thresholds), `val/mAP/tiou_0.50`, ..., and `val/AP/<class>`, with the
        classes named as MLflow takes them (`safe_names`).
    """
    metrics = {"val/mAP": float(result.average)}
    for threshold, value in zip(result.thresholds, result.mAP, strict=True):
        metrics[f"val/mAP/tiou_{float(threshold):.2f}"] = float(value)
    for name, value in zip(safe_names(classes), result.per_class.mean(0), strict=True):
        if torch.isfinite(torch.as_tensor(value)):  # a class without ground truth has no AP
            metrics[f"val/AP/{name}"] = float(value)
    return metrics


def instance_recall_metrics(result: ClassRecall) -> dict[str, float]:
    """Name the numbers of Recall@kx for MLflow, which takes no "@" in names.

    Returns:
        `val/recall_1x` (mean over thresholds), `val/recall_1x/tiou_0.50`, ...
    """
    metrics = {}
    for k, of_k in zip(result.ks, result.recall.T, strict=True):
        metrics[f"val/recall_{k}x"] = float(of_k.mean())
        for threshold, value in zip(result.thresholds, of_k, strict=True):
            metrics[f"val/recall_{k}x/tiou_{float(threshold):.2f}"] = float(value)
    return metrics


def evaluate(
    detections: Mapping[str, Detections],
    videos: Sequence[Video],
    classes: Sequence[str],
    thresholds: Sequence[float],
    *,
    ignore_ambiguous: bool = False,
    ks: Sequence[int] = (),
) -> dict[str, float]:
    """Compare detections with the annotations, as `precision` and `instance_recall` do.

    Returns:
        Metrics by the names of `map_metrics` and `instance_recall_metrics`.
    """
    result = precision(detections, videos, classes, thresholds, ignore_ambiguous=ignore_ambiguous)
    recall = instance_recall(detections, videos, classes, thresholds, ks=ks)
    return map_metrics(result, classes) | (instance_recall_metrics(recall) if recall else {})


def instance_recall(
    detections: Mapping[str, Detections],
    videos: Sequence[Video],
    classes: Sequence[str],
    thresholds: Sequence[float],
    *,
    ks: Sequence[int],
) -> ClassRecall | None:
    """Compute Recall@kx of detections, if any k is given.

    Args:
        detections: detections in seconds by video id.
        videos: annotated videos.
        classes: class names.
        thresholds: tIoU thresholds.
        ks: numbers of predictions per instance.

    Returns:
        Recall by class, threshold and k; None without any k.
    """
    if not ks:
        return None
    truth = ground_truth(videos, classes)
    return recall_at(truth, detections, num_classes=len(classes), ks=ks, thresholds=thresholds)


def precision(
    detections: Mapping[str, Detections],
    videos: Sequence[Video],
    classes: Sequence[str],
    thresholds: Sequence[float],
    *,
    ignore_ambiguous: bool,
) -> MapResult:
    """Compare detections with the annotations.

    Args:
        detections: detections in seconds by video id.
        videos: annotated videos.
        classes: class names.
        thresholds: tIoU thresholds.
        ignore_ambiguous: see `Recipe`.

    Returns:
        Average precision by class and threshold.
    """
    ambiguous = {
        video.annotation.video_id: torch.tensor(
            [[i.start, i.end] for i in video.annotation.ambiguous], dtype=torch.float64
        ).reshape(-1, 2)
        for video in videos
    }
    return mean_average_precision(
        ground_truth(videos, classes),
        detections,
        num_classes=len(classes),
        thresholds=thresholds,
        ambiguous=ambiguous if ignore_ambiguous else None,
    )
