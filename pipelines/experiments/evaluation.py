"""Evaluation of whole test sets, against the definition followed one prediction at a time.

Times are CPU seconds of all threads; the ways take turns.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.experiments.experiment import Row, Tables
from pipelines.experiments.timing import against_the_first, computed
from re2tal.detection.evaluation import average_recall, mean_average_precision, recall_at
from re2tal.detection.segments import Detections

Videos = dict[str, Detections]
Segment = tuple[float, float]


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
        """Draw ground truth and predictions: most near an instance, most of its class.

        The numbers are the same on every machine: after the generator, operations are exact or
        rounded.
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
        """SHA-256 of the test set, which tells changes of the set from changes of an evaluator."""
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


def measure(*, rounds: int = 3) -> Tables:
    """Time mAP and recall on two test sets.

    Args:
        rounds: number of turns of each way.
    """
    tables = {}
    for load in (ACTIVITYNET, THUMOS):
        tables[f"mAP, {load.title}"] = compare(load, rounds=rounds)
        tables[f"Recall, {load.title}"] = recall_times(load, rounds=rounds)
    return tables


def compare(load: RandomTestSet, *, rounds: int) -> list[Row]:
    """Compare the ways to compute the average precisions of all classes."""
    truth, found = load.build()
    sizes: dict[str, Any] = {"num_classes": load.classes, "thresholds": load.thresholds}
    ways: Mapping[str, Callable[[], NDArray[np.float64]]] = {
        "a prediction at a time": lambda: sequential(truth, found, **sizes),
        "all videos in one pass": lambda: mean_average_precision(truth, found, **sizes).per_class,
    }
    return against_the_first(ways, rounds, lambda a, b: float(np.nanmax(abs(a - b))))


def recall_times(load: RandomTestSet, *, rounds: int) -> list[Row]:
    """Time each kind of recall."""
    truth, found = load.build()
    times, _ = computed(
        {
            "average recall of up to 100 proposals": lambda: average_recall(truth, found),
            "recall at 1x and 5x": lambda: recall_at(
                truth, found, num_classes=load.classes, thresholds=load.thresholds
            ),
        },
        rounds,
    )
    return [{"metric": name, "seconds": median(seconds)} for name, seconds in times.items()]


def sequential(
    truth: Mapping[str, Detections],
    predictions: Mapping[str, Detections],
    *,
    num_classes: int,
    thresholds: Sequence[float],
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
    """Tell whether each guess takes an instance, by threshold."""
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
    """Integrate, over recall, the best precision at each recall or a higher one."""
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
    """Split into one entry per video; `video` rises."""
    names, counts = video.unique_consecutive(return_counts=True)
    sizes = counts.tolist()
    parts = zip(segments.split(sizes), scores.split(sizes), labels.split(sizes), strict=True)
    return {
        f"video {name}": Detections(segments=s, scores=c, labels=label)
        for name, (s, c, label) in zip(names.tolist(), parts, strict=True)
    }
