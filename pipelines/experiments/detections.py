"""Experiments `nms` and `evaluation`: speed on whole test sets, against sequential definitions."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.experiments.experiment import Row, Tables
from pipelines.experiments.timing import computed, ratios
from re2tal.detection.evaluation import average_recall, mean_average_precision, recall_at
from re2tal.detection.segments import Detections
from re2tal.detection.suppression import NmsConfig, nms, nms_videos

Floats = NDArray[np.float32]
Videos = dict[str, Detections]
Segment = tuple[float, float]
T = TypeVar("T")

# NMS.


@dataclass(frozen=True, kw_only=True, slots=True)
class RawDetections:
    """Workload: `raw` detections in `classes` for each of `videos`, and the settings of NMS."""

    title: str
    videos: int
    raw: int
    classes: int
    config: NmsConfig

    def build(self) -> Videos:
        """Draw random detections within 200 seconds; most scores are low, like a detector's."""
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


RAW = (
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


def measure_nms(*, rounds: int = 3) -> Tables:
    """NMS of many videos in one pass, against one video at a time and one detection at a time.

    Times are CPU seconds of all threads; the ways take turns.

    Args:
        rounds: number of turns of each way.
    """
    return {f"Soft-NMS, {load.title}": compare_nms(load, rounds=rounds) for load in RAW}


def compare_nms(load: RawDetections, *, rounds: int) -> list[Row]:
    """Compare the implementations of NMS."""
    videos = load.build()
    ways: Mapping[str, Callable[[], Videos]] = {
        "a detection at a time (NumPy)": lambda: sequential_nms(videos, load.config),
        "a video at a time": lambda: {v: nms(found, load.config) for v, found in videos.items()},
        "all videos in one pass": lambda: nms_videos(videos, load.config),
    }
    return _against_the_first(ways, rounds, _difference)


def sequential_nms(videos: Mapping[str, Detections], config: NmsConfig) -> Videos:
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
    """Return up to `top_k` picks in order, and their scores at the time of picking."""
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
        # Gaussian soft-NMS: each score is multiplied by exp(-tIoU^2 / sigma)
        waiting *= np.exp(overlap**2 / np.float32(-config.sigma))
        waiting[pick] = -1
    return picks, weakened


def _difference(a: Videos, b: Videos) -> float:
    """Return the largest difference of scores; infinite if the kept segments differ."""
    largest = 0.0
    for video_id, found in a.items():
        other = b[video_id]
        if not torch.equal(found.segments, other.segments):
            return math.inf
        largest = max(largest, float((found.scores - other.scores).abs().max()))
    return largest


# Evaluation.


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomTestSet:
    """Test set of `videos` with `instances`, and `found` predictions in each video."""

    title: str
    videos: int
    instances: int
    classes: int
    found: int
    thresholds: tuple[float, ...]

    def build(self) -> tuple[Videos, Videos]:
        """Draw ground truth and predictions, most of them near an instance and of its class.

        The numbers are the same on every machine: after the generator, all operations are exact or
        their results are rounded.
        """
        g = torch.Generator().manual_seed(0)
        extra = torch.randint(self.videos, (self.instances - self.videos,), generator=g)
        video = torch.cat([torch.arange(self.videos), extra]).sort().values
        theme = torch.randint(
            self.classes, (self.videos, 2), generator=g
        )  # a video has few classes
        label = theme[video, torch.randint(2, video.shape, generator=g)]
        start = torch.rand(self.instances, generator=g, dtype=torch.float64) * 180
        actual = _segments(start, torch.rand(start.shape, generator=g, dtype=torch.float64) * 30)

        guess = torch.arange(self.videos).repeat_interleave(self.found)
        counts = torch.bincount(video, minlength=self.videos)
        pick = (torch.rand(guess.shape, generator=g) * counts[guess]).long()
        near = (counts.cumsum(0) - counts)[guess] + pick
        length = actual[near, 1] - actual[near, 0]
        noise = torch.randn(*guess.shape, 2, generator=g, dtype=torch.float64)
        noise = noise.round(decimals=6)  # the last digits of logarithms depend on the machine
        shift = noise * (0.15 * length + 0.1)[:, None] * (1 + 9 * (pick + guess) % 3)[:, None]
        moved = actual[near] + shift
        guessed = _segments(moved.amin(1), moved.amax(1) - moved.amin(1))
        other = torch.randint(self.classes, guess.shape, generator=g)
        of_guess = torch.where(torch.rand(guess.shape, generator=g) < 0.8, label[near], other)
        scores = torch.rand(guess.shape, generator=g, dtype=torch.float64)
        scores = scores / (1 + noise.abs().sum(1))
        return (
            _by_video(video, actual, torch.ones_like(start), label),
            _by_video(guess, guessed, scores, of_guess),
        )

    def checksum(self) -> str:
        """Return the set's SHA-256, which separates changes of the set from those of evaluators."""
        digest = hashlib.sha256()
        for videos in self.build():
            for name, part in videos.items():
                digest.update(name.encode())
                for column in (part.segments, part.scores, part.labels):
                    digest.update(column.numpy().tobytes())
        return digest.hexdigest()


TENTHS = tuple(float(level) for level in np.linspace(0.3, 0.7, 5))
TWENTIETHS = tuple(float(level) for level in np.linspace(0.5, 0.95, 10))
ACTIVITYNET = RandomTestSet(
    title="ActivityNet-1.3: 4,728 videos, 7,654 instances, 200 classes, 100 predictions a video",
    videos=4728,
    instances=7654,
    classes=200,
    found=100,
    thresholds=TWENTIETHS,
)
THUMOS = RandomTestSet(
    title="THUMOS-14: 213 videos, 3,358 instances, 20 classes, 200 predictions a video",
    videos=213,
    instances=3358,
    classes=20,
    found=200,
    thresholds=TENTHS,
)


def measure_evaluation(*, rounds: int = 3) -> Tables:
    """Evaluation of whole test sets, against the definition applied to one prediction at a time.

    Times are CPU seconds of all threads; the ways take turns.

    Args:
        rounds: number of turns of each way.
    """
    tables = {}
    for load in (ACTIVITYNET, THUMOS):
        tables[f"mAP, {load.title}"] = compare_evaluation(load, rounds=rounds)
        tables[f"Recall, {load.title}"] = _recall_times(load, rounds=rounds)
    return tables


def compare_evaluation(load: RandomTestSet, *, rounds: int) -> list[Row]:
    """Compare the ways to compute the average precisions of all classes."""
    truth, found = load.build()
    sizes: dict[str, Any] = {"num_classes": load.classes, "thresholds": load.thresholds}
    ways: Mapping[str, Callable[[], NDArray[np.float64]]] = {
        "a prediction at a time": lambda: sequential(truth, found, **sizes),
        "all videos in one pass": lambda: mean_average_precision(truth, found, **sizes).per_class,
    }
    return _against_the_first(ways, rounds, lambda a, b: float(np.nanmax(abs(a - b))))


def _recall_times(load: RandomTestSet, *, rounds: int) -> list[Row]:
    truth, found = load.build()
    sizes: dict[str, Any] = {"num_classes": load.classes, "thresholds": load.thresholds}
    ways: Mapping[str, Callable[[], object]] = {
        "average recall of up to 100 proposals": lambda: average_recall(truth, found),
        "recall at 1x and 5x": lambda: recall_at(truth, found, **sizes),
    }
    times, _ = computed(ways, rounds)
    return [{"metric": name, "seconds": median(seconds)} for name, seconds in times.items()]


def sequential(
    truth: Videos, predictions: Videos, *, num_classes: int, thresholds: Sequence[float]
) -> NDArray[np.float64]:
    """Compute average precision `(K, C)` as defined: class by class, one prediction at a time."""
    instances: dict[int, dict[str, list[Segment]]] = defaultdict(lambda: defaultdict(list))
    for video, (start, end), _, label in _rows(truth):
        instances[label][video].append((start, end))
    guesses: dict[int, list[tuple[float, str, Segment]]] = defaultdict(list)
    for video, (start, end), score, label in _rows(predictions):
        guesses[label].append((score, video, (start, end)))
    precision = np.full((len(thresholds), num_classes), np.nan)
    for label, of_class in instances.items():
        visited = sorted(guesses[label], key=lambda guess: -guess[0])
        hits = _visit(of_class, visited, thresholds)
        count = sum(len(of_video) for of_video in of_class.values())
        precision[:, label] = [_area(of_level, count) for of_level in hits]
    return precision


def _visit(
    instances: Mapping[str, Sequence[Segment]],
    guesses: Sequence[tuple[float, str, Segment]],
    thresholds: Sequence[float],
) -> list[list[bool]]:
    """Tell for each threshold whether each guess matches an instance that is still free."""
    hits: list[list[bool]] = [[] for _ in thresholds]
    taken: list[set[tuple[str, int]]] = [set() for _ in thresholds]
    for _, video, guess in guesses:
        overlaps = [_overlap(guess, actual) for actual in instances.get(video, ())]
        preferred = sorted(range(len(overlaps)), key=lambda index: -overlaps[index])
        for level, threshold in enumerate(thresholds):
            free = (i for i in preferred if (video, i) not in taken[level])
            best = next(free, None)
            hit = best is not None and overlaps[best] >= threshold
            if hit and best is not None:
                taken[level].add((video, best))
            hits[level].append(hit)
    return hits


def _overlap(a: Segment, b: Segment) -> float:
    shared = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    union = (a[1] - a[0]) + (b[1] - b[0]) - shared
    return shared / union if union > 0 else math.inf


def _area(hits: Sequence[bool], count: int) -> float:
    """Integrate interpolated precision over recall: the best at each recall or a higher one."""
    found, curve = 0, []
    for visited, hit in enumerate(hits, start=1):
        found += hit
        curve.append((hit, found / visited))
    area = best = 0.0
    for hit, precision in reversed(curve):
        best = max(best, precision)
        area += best * hit / count
    return area


def _rows(videos: Mapping[str, Detections]) -> list[tuple[str, Segment, float, int]]:
    return [
        (name, (start, end), score, label)
        for name, part in videos.items()
        for (start, end), score, label in zip(
            part.segments.tolist(), part.scores.tolist(), part.labels.tolist(), strict=True
        )
    ]


def _segments(start: Tensor, length: Tensor) -> Tensor:
    return torch.stack([start, start + length], dim=1)


def _by_video(video: Tensor, segments: Tensor, scores: Tensor, labels: Tensor) -> Videos:
    """Split into one entry per video; `video` is sorted."""
    names, counts = video.unique_consecutive(return_counts=True)
    sizes = counts.tolist()
    parts = zip(segments.split(sizes), scores.split(sizes), labels.split(sizes), strict=True)
    return {
        f"video {name}": Detections(segments=s, scores=c, labels=label)
        for name, (s, c, label) in zip(names.tolist(), parts, strict=True)
    }


def _against_the_first(
    ways: Mapping[str, Callable[[], T]], rounds: int, difference: Callable[[T, T], float]
) -> list[Row]:
    """Tabulate CPU seconds, and the difference of each way's result from that of the first."""
    times, results = computed(ways, rounds)
    first, *_ = ways
    return [
        {
            "way": name,
            "seconds": median(seconds),
            "times as fast": median(ratios(times[first], seconds)),
            "largest difference": difference(results[name], results[first]),
        }
        for name, seconds in times.items()
    ]
