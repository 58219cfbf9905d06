"""NMS of many videos in one pass, against a video at a time and a detection at a time.

Times are CPU seconds of all threads; the ways take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.experiments.experiment import Row, Tables
from pipelines.experiments.timing import against_the_first
from re2tal.detection.segments import Detections
from re2tal.detection.suppression import NmsConfig, nms, nms_videos

Floats = NDArray[np.float32]
Videos = dict[str, Detections]


@dataclass(frozen=True, kw_only=True, slots=True)
class RawDetections:
    """Load: `raw` detections in `classes` for each of `videos`, and settings of their NMS."""

    title: str
    videos: int
    raw: int
    classes: int
    config: NmsConfig

    def build(self) -> Videos:
        """Draw detections at random in 200 seconds; most scores are low, as a detector's are."""
        generator = torch.Generator().manual_seed(0)
        found = {}
        for number in range(self.videos):
            centre = torch.rand(self.raw, generator=generator) * 200
            half = torch.rand(self.raw, generator=generator) ** 2 * 15 + 0.05
            found[f"video {number}"] = Detections(
                segments=torch.stack([centre - half, centre + half], dim=1),
                scores=torch.rand(self.raw, generator=generator) ** 6,
                labels=torch.randint(self.classes, (self.raw,), generator=generator),
            )
        return found


WORKLOADS = (
    RawDetections(
        title="THUMOS-14: 100 videos x 2000, 20 classes, best 200",
        videos=100,
        raw=2000,
        classes=20,
        config=NmsConfig(),
    ),
    RawDetections(
        title="ActivityNet: 300 videos x 2000, all classes together, best 100",
        videos=300,
        raw=2000,
        classes=1,
        config=NmsConfig(sigma=0.75, per_class=False, top_k=100),
    ),
)


def measure(*, rounds: int = 3) -> Tables:
    """Time soft-NMS of the detections of two data sets.

    Args:
        rounds: number of turns of each way.
    """
    return {f"Soft-NMS, {load.title}": compare(load, rounds=rounds) for load in WORKLOADS}


def compare(load: RawDetections, *, rounds: int) -> list[Row]:
    """Compare the implementations."""
    videos = load.build()
    ways: Mapping[str, Callable[[], Mapping[str, Detections]]] = {
        "a detection at a time (NumPy)": lambda: sequential(videos, load.config),
        "a video at a time": lambda: {v: nms(found, load.config) for v, found in videos.items()},
        "all videos in one pass": lambda: nms_videos(videos, load.config),
    }
    return against_the_first(ways, rounds, _difference)


def sequential(videos: Mapping[str, Detections], config: NmsConfig) -> Videos:
    """Apply soft-NMS by its definition: class by class, one detection at a time."""
    result = {}
    for video_id, found in videos.items():
        labels = found.labels.numpy() if config.per_class else np.zeros(len(found), np.int64)
        segments, scores = found.segments.numpy(), found.scores.numpy()
        left = np.zeros_like(scores)
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            picks, weakened = _one_class(segments[members], scores[members], config)
            left[members[picks]] = weakened
        best = np.argsort(-left, kind="stable")[: config.top_k]
        best = best[left[best] >= config.min_score]
        kept = torch.from_numpy(best)
        result[video_id] = Detections(
            segments=found.segments[kept],
            scores=torch.from_numpy(left[best]),
            labels=found.labels[kept],
        )
    return result


def _one_class(
    segments: Floats, scores: Floats, config: NmsConfig
) -> tuple[list[int], list[np.float32]]:
    """Return the picks in their order, at most `top_k`, and their scores when they were picked."""
    starts, ends = segments.T.copy()
    lengths, waiting = ends - starts, scores.copy()
    picks: list[int] = []
    weakened: list[np.float32] = []
    while len(picks) < config.top_k:
        pick = int(waiting.argmax())
        if waiting[pick] < config.min_score:
            break
        picks.append(pick)
        weakened.append(waiting[pick])
        shared = np.minimum(ends, ends[pick]) - np.maximum(starts, starts[pick])
        shared = shared.clip(min=0)
        overlap = shared / (lengths + lengths[pick] - shared)
        waiting *= np.exp(overlap**2 / np.float32(-config.sigma))
        waiting[pick] = -1
    return picks, weakened


def _difference(a: Mapping[str, Detections], b: Mapping[str, Detections]) -> float:
    """Return the largest difference of scores; infinite if other segments are kept."""
    largest = 0.0
    for video_id, found in a.items():
        other = b[video_id]
        if not torch.equal(found.segments, other.segments):
            return float("inf")
        largest = max(largest, float((found.scores - other.scores).abs().max()))
    return largest
