"""Mean average precision of detections, as ActivityNet's official evaluator defines it.

For one class and one tIoU threshold, the predictions of all videos are visited by falling score.
Each one takes the ground truth of its video and class that it overlaps most among those not yet
taken and overlapped by at least the threshold (so a prediction whose best ground truth is taken
falls through to its next best, unlike in Pascal VOC); without any, it is a false positive. The
average precision is the area under the interpolated precision-recall curve; the mean over the
classes that have ground truth is the mAP.

What the definition leaves open or hides, and what happens here:

- equal scores are visited in the order of `predictions` and of each video's detections (the
  official code's order is arbitrary); of ground truth overlapped equally the first is taken;
- nothing is cut to a video's duration, and duplicates in the ground truth stay, each to be found;
- predictions in videos without ground truth of their class, or unknown altogether, are false
  positives;
- two zero-length segments of a class in one video match at every threshold, wherever they are,
  as the official code's 0/0 does (ActivityNet's validation set has three such instances).

A match depends only on what came before it in the same video and class. So these groups advance
side by side, one prediction each a step, for all thresholds at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from re2tal.detection.segments import Detections, LabelledSegments, tiou

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class MapResult:
    """Average precision by class and threshold.

    Attributes:
        thresholds: `(K,)` tIoU thresholds.
        per_class: `(K, C)` average precision in [0, 1]; nan for classes without ground truth.
        mAP: `(K,)` mean over the classes that have ground truth.
        average: mean over the thresholds.
    """

    thresholds: Floats
    per_class: Floats
    mAP: Floats  # noqa: N815 - the field writes it so
    average: float


def mean_average_precision(
    truth: Mapping[str, LabelledSegments],
    predictions: Mapping[str, Detections],
    *,
    num_classes: int,
    thresholds: Sequence[float],
) -> MapResult:
    """Average precision of `predictions` (definition: module docstring).

    Computed in float64. Reversed segments count as zero-length ones.

    Args:
        truth: of every video of the evaluated subset, its instances (maybe none). The unit of
            the segments must be that of the predictions, usually seconds.
        predictions: by video; videos may be missing or unknown.
        num_classes: C; labels are 0 to C - 1.
        thresholds: K tIoU thresholds above 0.

    Returns:
        The result per threshold and class.

    Raises:
        ValueError: If there is no ground truth at all, a label is not in range, a score is not a
            number, a segment is not finite or a threshold is not in (0, 1].
    """
    levels = np.asarray(thresholds, dtype=np.float64)
    if levels.size == 0 or not bool(((levels > 0) & (levels <= 1)).all()):
        raise ValueError(f"Thresholds must lie in (0, 1], but got {list(thresholds)}.")
    videos = {video: index for index, video in enumerate((*truth, *predictions))}
    actual = _table(truth, videos, num_classes, what="ground truth")
    found = _table(predictions, videos, num_classes, what="predictions")
    if len(actual.labels) == 0:
        raise ValueError(
            f"There is no ground truth in any of the {len(truth)} videos, so average precision "
            "is not defined: check the subset and the class names."
        )
    scores = _scores(predictions)
    order = np.argsort(-scores, kind="stable")
    found = found.pick(order)
    hits = _match(actual, found, num_classes, levels)

    per_class = np.full((len(levels), num_classes), np.nan)
    for label in np.unique(actual.labels):
        of_class = hits[:, found.labels == label]
        count = int((actual.labels == label).sum())
        per_class[:, label] = _interpolated_average_precision(of_class, count)
    means = np.nanmean(per_class, axis=1)
    return MapResult(thresholds=levels, per_class=per_class, mAP=means, average=float(means.mean()))


@dataclass(frozen=True, slots=True)
class _Table:
    """Segments `(N, 2)` of all videos in one table, with their videos and labels `(N,)`."""

    segments: Floats
    videos: Ints
    labels: Ints

    def pick(self, rows: Ints) -> _Table:
        return _Table(self.segments[rows], self.videos[rows], self.labels[rows])


def _table(
    parts: Mapping[str, LabelledSegments], videos: Mapping[str, int], num_classes: int, what: str
) -> _Table:
    """One table of all videos' segments; complains about labels and segments out of range."""
    segments = [np.zeros((0, 2))]
    labels = [np.zeros(0, dtype=np.int64)]
    counts = []
    for video, part in parts.items():
        segments.append(part.segments.detach().double().cpu().numpy().reshape(-1, 2))
        labels.append(part.labels.detach().cpu().numpy().astype(np.int64))
        counts.append(len(labels[-1]))
        if ((labels[-1] < 0) | (labels[-1] >= num_classes)).any():
            raise ValueError(
                f"The {what} of video {video!r} have labels outside 0 to {num_classes - 1}."
            )
        if not np.isfinite(segments[-1]).all():
            raise ValueError(f"The {what} of video {video!r} have a segment that is not finite.")
    of_video = np.array([videos[video] for video in parts], dtype=np.int64)
    return _Table(np.concatenate(segments), of_video.repeat(counts), np.concatenate(labels))


def _scores(predictions: Mapping[str, Detections]) -> Floats:
    """The scores of all predictions, in the order of their table."""
    scores = [np.zeros(0)]
    for video, part in predictions.items():
        scores.append(part.scores.detach().double().cpu().numpy())
        if np.isnan(scores[-1]).any():
            raise ValueError(f"A prediction in video {video!r} has a score that is not a number.")
    return np.concatenate(scores)


def _match(actual: _Table, found: _Table, num_classes: int, levels: Floats) -> NDArray[np.bool_]:
    """Which of the `found`, sorted by falling score, are true positives: `(K, P)`."""
    hits = np.zeros((len(levels), len(found.labels)), dtype=bool)
    groups, of_actual = np.unique(actual.videos * num_classes + actual.labels, return_inverse=True)
    keys = found.videos * num_classes + found.labels
    of_found = np.searchsorted(groups, keys).clip(max=len(groups) - 1)
    candidates = np.flatnonzero(groups[of_found] == keys)
    if len(candidates) == 0:
        return hits
    truth_rows = _padded(of_actual, len(groups))  # (G, N)
    guess_rows = _padded(of_found[candidates], len(groups))  # (G, P)
    # Groups with the most predictions first: those still at work are then always a prefix.
    by_work = np.argsort(-(guess_rows >= 0).sum(axis=1), kind="stable")
    truth_rows, guess_rows = truth_rows[by_work], guess_rows[by_work]
    truth_segments = actual.segments[truth_rows]
    free = np.broadcast_to(truth_rows >= 0, (len(levels), *truth_rows.shape)).copy()
    for step in range(guess_rows.shape[1]):
        active = int((guess_rows[:, step] >= 0).sum())
        rows = candidates[guess_rows[:active, step]]
        overlap = _official_overlap(found.segments[rows][:, None], truth_segments[:active])
        open_to = free[:, :active] & (overlap >= levels[:, None, None])
        best = np.where(open_to, overlap, -1.0).argmax(axis=2)  # (K, active), of equals the first
        hit = np.take_along_axis(open_to, best[..., None], axis=2)[..., 0]
        hits[:, rows] = hit
        level, group = np.nonzero(hit)
        free[level, group, best[level, group]] = False
    return hits


def _padded(groups: Ints, num_groups: int) -> Ints:
    """The positions of each group's members in order, padded with -1: `(num_groups, longest)`."""
    counts = np.bincount(groups, minlength=num_groups)
    order = np.argsort(groups, kind="stable")
    rows = np.full((num_groups, counts.max()), -1, dtype=np.int64)
    first = np.cumsum(counts) - counts
    rows[groups[order], np.arange(len(order)) - first[groups[order]]] = order
    return rows


def _official_overlap(predicted: Floats, actual: Floats) -> Floats:
    """`tiou`, but infinite between zero-length segments, as explained in the module docstring."""
    overlap = tiou(torch.from_numpy(predicted), torch.from_numpy(actual)).numpy()
    instants = (predicted[..., 1] <= predicted[..., 0]) & (actual[..., 1] <= actual[..., 0])
    return np.where(instants, np.inf, overlap)


def _interpolated_average_precision(hits: NDArray[np.bool_], count: int) -> Floats:
    """Area under the interpolated precision-recall curve.

    Args:
        hits: `(K, P)` whether each prediction, by falling score, is a true positive.
        count: instances in the ground truth, at least one.

    Returns:
        `(K,)` average precision.
    """
    found = hits.cumsum(axis=1)
    precision = found / np.arange(1, hits.shape[1] + 1)
    # Interpolation: at each recall the best precision at that recall or a higher one.
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return np.where(hits, best, 0.0).sum(axis=1) / count
