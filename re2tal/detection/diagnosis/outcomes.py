"""Which prediction found which instance: what all parts of the diagnosis start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from re2tal.detection.segments import Detections, LabelledSegments, tiou

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Segments of all videos in one table.

    Attributes:
        segments: `(N, 2)` starts and ends in seconds.
        videos: `(N,)` indices of the videos.
        labels: `(N,)` class indices.
    """

    segments: Floats
    videos: Ints
    labels: Ints

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Ints | Bools) -> Rows:
        """The rows that an index `(M,)` or a mask `(N,)` picks."""
        return Rows(
            segments=self.segments[rows], videos=self.videos[rows], labels=self.labels[rows]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """Every instance, every prediction, and which found which.

    Instances without length are left out, as in DETAD: nothing can overlap them. Predictions of
    classes without an instance are left out too: they have no part in a mean over the classes
    that have instances, and none in the top predictions, which are counted in instances.

    Attributes:
        thresholds: `(K,)` tIoU thresholds.
        videos: the names of the videos that the tables count.
        truth: G instances.
        found: P predictions by class, and within a class by falling score.
        counts: `(C,)` instances of each class.
        starts: `(C + 1,)` where each class's predictions start: class c has `starts[c]` to
            `starts[c + 1] - 1`.
        matched: `(K, P)` index of the instance that a prediction found, -1 where it found none.
        left_out: number of instances without length.
    """

    thresholds: Floats
    videos: tuple[str, ...]
    truth: Rows
    found: Rows
    counts: Ints
    starts: Ints
    matched: Ints
    left_out: int

    @property
    def ranks(self) -> Ints:
        """`(P,)` how many predictions of its class come before each prediction."""
        return np.arange(len(self.found)) - self.starts[self.found.labels]


def collect(
    truth: Mapping[str, LabelledSegments],
    predictions: Mapping[str, Detections],
    *,
    num_classes: int,
    thresholds: Sequence[float],
) -> Outcomes:
    """Matches predictions with instances as ActivityNet's official evaluator does.

    By falling score (equal scores in their given order), each prediction takes the instance of
    its video and class that it overlaps most among those that are free and overlapped by at least
    the threshold.

    Args:
        truth: of every video, its instances in seconds (maybe none).
        predictions: by video, in seconds; videos may be missing or unknown.
        num_classes: C; labels are 0 to C - 1.
        thresholds: K tIoU thresholds in (0, 1].

    Raises:
        ValueError: If there is no instance with a length, or a label, segment, score or threshold
            is not one.
    """
    levels = np.asarray(thresholds, dtype=np.float64)
    if levels.size == 0 or not bool(((levels > 0) & (levels <= 1)).all()):
        raise ValueError(f"Thresholds must lie in (0, 1], but got {list(thresholds)}.")
    videos = tuple(dict.fromkeys((*truth, *predictions)))
    every = _rows(truth, videos, num_classes, what="ground truth")
    lengths = every.segments[:, 1] - every.segments[:, 0]
    actual = every[lengths > 0]
    if len(actual) == 0:
        raise ValueError(
            f"There is no instance with a length in any of the {len(truth)} videos, so there is "
            "nothing to diagnose: check the subset and the class names."
        )
    counts = np.bincount(actual.labels, minlength=num_classes)
    found = _rows(predictions, videos, num_classes, what="predictions")
    order = np.lexsort((-_scores(predictions), found.labels))
    found = found[order[counts[found.labels[order]] > 0]]
    return Outcomes(
        thresholds=levels,
        videos=videos,
        truth=actual,
        found=found,
        counts=counts,
        starts=np.searchsorted(found.labels, np.arange(num_classes + 1)),
        matched=_match(actual, found, num_classes, levels),
        left_out=len(every) - len(actual),
    )


def overlaps(segments: Floats, candidates: Floats) -> Floats:
    """The tIoU `(N, M)` of segments `(N, 2)` with each one's own candidates `(N, M, 2)`."""
    return tiou(torch.from_numpy(segments[:, None]), torch.from_numpy(candidates)).numpy()


def padded(keys: Ints, num_keys: int) -> Ints:
    """The positions that hold each key, in order, padded with -1: `(num_keys, most)`."""
    order = np.argsort(keys, kind="stable")
    members = np.full((num_keys, np.bincount(keys, minlength=num_keys).max()), -1, dtype=np.int64)
    members[keys[order], _occurrence(keys)[order]] = order
    return members


def _occurrence(keys: Ints) -> Ints:
    """How often each entry's key occurred before it: `(N,)`."""
    order = np.argsort(keys, kind="stable")
    in_order = keys[order]
    seen = np.empty_like(keys)
    seen[order] = np.arange(len(keys)) - np.searchsorted(in_order, in_order)
    return seen


def _match(truth: Rows, found: Rows, num_classes: int, levels: Floats) -> Ints:
    """The instance that each prediction takes, or -1: `(K, P)`.

    Videos and classes do not interfere, so all of them advance together: their first predictions,
    then their second ones, and so on.
    """
    matched = np.full((len(levels), len(found)), -1, dtype=np.int64)
    keys, of_truth = np.unique(truth.videos * num_classes + truth.labels, return_inverse=True)
    of_found = found.videos * num_classes + found.labels
    position = np.searchsorted(keys, of_found).clip(max=len(keys) - 1)
    candidates = np.flatnonzero(keys[position] == of_found)
    members = padded(of_truth, len(keys))
    turn = _occurrence(of_found[candidates])
    by_turn = candidates[np.argsort(turn, kind="stable")]
    # One column more than there are instances: index -1, the padding, is never free.
    free = np.ones((len(levels), len(truth) + 1), dtype=bool)
    free[:, -1] = False
    for rows in np.split(by_turn, np.cumsum(np.bincount(turn))[:-1]) if len(turn) else []:
        nearby = members[position[rows]]  # (R, M)
        overlap = overlaps(found.segments[rows], truth.segments[nearby])
        open_to = free[:, nearby] & (overlap >= levels[:, None, None])  # (K, R, M)
        best = np.where(open_to, overlap, -1.0).argmax(axis=2)  # (K, R), of equals the first
        taken = nearby[np.arange(len(rows)), best]
        hit = open_to.any(axis=2)
        matched[:, rows] = np.where(hit, taken, -1)
        level, row = np.nonzero(hit)
        free[level, taken[level, row]] = False
    return matched


def _rows(
    parts: Mapping[str, LabelledSegments], videos: Sequence[str], num_classes: int, what: str
) -> Rows:
    """One table of all videos' segments; complains about labels and segments out of range."""
    index = {video: number for number, video in enumerate(videos)}
    segments = [np.zeros((0, 2))]
    labels = [np.zeros(0, dtype=np.int64)]
    for video, part in parts.items():
        segments.append(part.segments.detach().double().cpu().numpy().reshape(-1, 2))
        labels.append(part.labels.detach().cpu().numpy().astype(np.int64))
        if ((labels[-1] < 0) | (labels[-1] >= num_classes)).any():
            raise ValueError(
                f"The {what} of video {video!r} have labels outside 0 to {num_classes - 1}."
            )
        if not np.isfinite(segments[-1]).all():
            raise ValueError(f"The {what} of video {video!r} have a segment that is not finite.")
    of_part = np.array([index[video] for video in parts], dtype=np.int64)
    return Rows(
        segments=np.concatenate(segments),
        videos=of_part.repeat([len(part) for part in labels[1:]]),
        labels=np.concatenate(labels),
    )


def _scores(predictions: Mapping[str, Detections]) -> Floats:
    """The scores of all predictions, in the order of their table."""
    scores = [np.zeros(0)]
    for video, part in predictions.items():
        scores.append(part.scores.detach().double().cpu().numpy())
        if np.isnan(scores[-1]).any():
            raise ValueError(f"A prediction in video {video!r} has a score that is not a number.")
    return np.concatenate(scores)
