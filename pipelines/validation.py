"""Sliding-window evaluation of a detector over the validation videos, shared by the workers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipelines.data import Batch, Video
from re2tal.detect import video_detections, window_detections
from re2tal.detection.evaluation import MapResult, mean_average_precision
from re2tal.detection.nms import NmsConfig
from re2tal.detection.segments import Detections
from re2tal.detector import Detector
from re2tal.videos.windows import Window, WindowConfig, sliding_windows


def gather(value: Any) -> list[Any]:
    """Collects a picklable value of every worker, by rank; without workers, just this one's."""
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
    """Returns the sliding windows of every world_size-th video, from the rank-th on.

    Args:
        videos: all validation videos.
        classes: class names.
        config: how windows are cut.
        stride: frames per feature, of the backbone.
        rank: of this worker.
        world_size: number of workers.
    """
    mine = videos[rank::world_size]
    return [w for v in mine for w in sliding_windows(v.annotation, classes, config, stride=stride)]


@torch.inference_mode()
def detect_windows(
    detector: Detector, batches: Iterable[Batch], durations: Mapping[str, float], nms: NmsConfig
) -> tuple[dict[str, Detections], dict[str, str]]:
    """Runs a detector over windows and merges those of each video.

    Args:
        detector: in evaluation mode.
        batches: windows; a video's may lie in several batches.
        durations: video id to seconds.
        nms: post-processing of a video's detections.

    Returns:
        Video id to its detections in seconds; video id to reason where decoding failed.
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
    return {video_id: video_detections(parts, nms) for video_id, parts in found.items()}, failures


def ground_truth(videos: Sequence[Video], classes: Sequence[str]) -> dict[str, Detections]:
    """Returns the annotated instances of videos, in seconds, each with score 1.

    Args:
        videos: annotated videos.
        classes: class names; labels are indices into it.
    """
    index = {name: i for i, name in enumerate(classes)}
    return {
        video.annotation.video_id: Detections(
            segments=torch.tensor([[i.start, i.end] for i in video.annotation.instances]).reshape(
                -1, 2
            ),
            scores=torch.ones(len(video.annotation.instances)),
            labels=torch.tensor(
                [index[i.label] for i in video.annotation.instances], dtype=torch.int64
            ),
        )
        for video in videos
    }


def map_metrics(result: MapResult, classes: Sequence[str]) -> dict[str, float]:
    """Names the numbers of an evaluation for MLflow.

    Args:
        result: mAP per threshold and class.
        classes: class names.

    Returns:
        `val/mAP` (mean over thresholds), `val/mAP/tiou_0.50`, ..., and `val/AP/<class>`.
    """
    metrics = {"val/mAP": float(result.average)}
    for threshold, value in zip(result.thresholds, result.mAP, strict=True):
        metrics[f"val/mAP/tiou_{float(threshold):.2f}"] = float(value)
    for name, value in zip(classes, result.per_class.mean(0), strict=True):
        if torch.isfinite(torch.as_tensor(value)):  # a class without ground truth has no AP
            metrics[f"val/AP/{name}"] = float(value)
    return metrics


def evaluate(
    detections: Mapping[str, Detections],
    videos: Sequence[Video],
    classes: Sequence[str],
    thresholds: Sequence[float],
) -> dict[str, float]:
    """Compares detections with the annotations.

    Args:
        detections: video id to detections in seconds.
        videos: annotated videos.
        classes: class names.
        thresholds: tIoU thresholds.

    Returns:
        Metrics by the names of `map_metrics`.
    """
    result = mean_average_precision(
        ground_truth(videos, classes), detections, num_classes=len(classes), thresholds=thresholds
    )
    return map_metrics(result, classes)
