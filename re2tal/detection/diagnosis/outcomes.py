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


def normalised_precision(outcomes: Outcomes, hits: Bools, false: Bools, counts: Ints) -> Floats:
    """Precision after each prediction as if every class had as many instances as the average.

    With N = instances per class on average, R = recall of the class so far, F = its false
    positives so far: P_N = R N / (R N + F), and 0 before the first of either. Plain precision
    would have the class's own number of instances in the place of N, so that of two classes whose
    detections are equally good the rarer one scores worse (Hoiem et al., ECCV 2012).

    Args:
        outcomes: the predictions.
        hits: `(K, P)` which predictions count as true positives.
        false: `(K, P)` which count as false positives. Those that are neither have been removed.
        counts: `(C,)` instances that each class's recall refers to.

    Returns:
        `(K, P)`.
    """
    typical = len(outcomes.truth) / np.count_nonzero(outcomes.counts)
    precision = np.zeros(hits.shape)
    for label in np.flatnonzero(counts):
        part = slice(outcomes.starts[label], outcomes.starts[label + 1])
        weight = hits[:, part].cumsum(axis=1) * (typical / counts[label])
        total = weight + false[:, part].cumsum(axis=1)
        np.divide(weight, total, out=precision[:, part], where=total > 0)
    return precision


def average_precision(outcomes: Outcomes, hits: Bools, false: Bools, counts: Ints) -> Floats:
    """Normalised average precision AP_N: the area under interpolated P_N over recall.

    Args:
        outcomes: the predictions.
        hits: `(K, P)` true positives.
        false: `(K, P)` false positives.
        counts: `(C,)` instances to be found.

    Returns:
        `(K, C)`; nan for classes without instances, 0 for those without predictions.
    """
    precision = normalised_precision(outcomes, hits, false, counts)
    area = np.full((len(hits), len(counts)), np.nan)
    for label in np.flatnonzero(counts):
        part = slice(outcomes.starts[label], outcomes.starts[label + 1])
        # Interpolation: at each recall the best precision at that recall or a higher one.
        best = np.maximum.accumulate(precision[:, part][:, ::-1], axis=1)[:, ::-1]
        area[:, label] = np.where(hits[:, part], best, 0.0).sum(axis=1) / counts[label]
    return area


def mean_average_precision(
    outcomes: Outcomes, hits: Bools, false: Bools, counts: Ints | None = None
) -> Floats:
    """mAP_N `(K,)`: the mean of AP_N over the classes that `counts` (default: all) has."""
    counts = outcomes.counts if counts is None else counts
    if not counts.any():
        return np.full(len(hits), np.nan)
    of_class = average_precision(outcomes, hits, false, counts)
    return of_class[:, counts > 0].mean(axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bins:
    """Intervals of a characteristic, open below and closed above.

    Bin i holds values in `(edges[i - 1], edges[i]]`; the first and the last have no outer limit.

    Attributes:
        edges: B - 1 inner limits, rising.
        names: B names.
    """

    edges: tuple[float, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.edges) + 1 or list(self.edges) != sorted(set(self.edges)):
            raise ValueError(
                f"Bins need rising inner limits and one name more than those, but got "
                f"{self.edges} and {self.names}."
            )

    def place(self, values: Floats) -> Ints:
        """Index of the bin of each of the `values` `(N,)`."""
        return np.searchsorted(self.edges, values, side="left")


@dataclass(frozen=True, kw_only=True, slots=True)
class Characteristics:
    """How each characteristic is cut into bins.

    Attributes:
        coverage: an instance's length as a share of its video's duration. Instances that are
            annotated beyond their video's end fall into the last bin (DETAD drops them).
        length: in seconds.
        instances: how many instances of any class the instance's video holds, as DETAD's own
            annotation files count them.
    """

    coverage: Bins
    length: Bins
    instances: Bins


_FIVE = ("XS", "S", "M", "L", "XL")
_FOUR = ("XS", "S", "M", "L")

ACTIVITYNET = Characteristics(
    coverage=Bins(edges=(0.2, 0.4, 0.6, 0.8), names=_FIVE),
    length=Bins(edges=(30, 60, 120, 180), names=_FIVE),
    instances=Bins(edges=(1, 4, 8), names=_FOUR),
)
"""DETAD's bins for ActivityNet."""

THUMOS = Characteristics(
    coverage=Bins(edges=(0.02, 0.04, 0.06, 0.08), names=_FIVE),
    length=Bins(edges=(3, 6, 12, 18), names=_FIVE),
    instances=Bins(edges=(1, 40, 80), names=_FOUR),
)
"""DETAD's bins for THUMOS-14, whose videos are long and whose actions are short."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """One characteristic of every instance.

    Attributes:
        bins: its bins.
        index: `(G,)` the bin of each instance.
    """

    bins: Bins
    index: Ints

    @property
    def counts(self) -> Ints:
        """`(B,)` instances in each bin."""
        return np.bincount(self.index, minlength=len(self.bins.names))


def characterise(
    outcomes: Outcomes, durations: Mapping[str, float], characteristics: Characteristics
) -> dict[str, Placed]:
    """Puts every instance into its bin of each characteristic.

    Args:
        outcomes: the instances.
        durations: seconds of every video that has instances.
        characteristics: the bins.

    Returns:
        By name, in the order coverage, length, instances.

    Raises:
        ValueError: If the duration of a video with instances is missing or not positive.
    """
    of_video = np.ones(len(outcomes.videos))
    for video in np.unique(outcomes.truth.videos):
        name = outcomes.videos[video]
        of_video[video] = durations.get(name, np.nan)
        if not of_video[video] > 0:
            raise ValueError(
                f"Video {name!r} has instances but no positive duration, so their coverage is "
                "unknown: give the durations of all videos with ground truth, in seconds."
            )
    lengths = outcomes.truth.segments[:, 1] - outcomes.truth.segments[:, 0]
    together = np.bincount(outcomes.truth.videos, minlength=len(outcomes.videos))
    values = {
        "coverage": (characteristics.coverage, lengths / of_video[outcomes.truth.videos]),
        "length": (characteristics.length, lengths),
        "instances": (characteristics.instances, together[outcomes.truth.videos].astype(float)),
    }
    return {
        name: Placed(bins=bins, index=bins.place(value)) for name, (bins, value) in values.items()
    }
