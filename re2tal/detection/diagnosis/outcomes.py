"""Matches of predictions and instances, normalised precision, and bins of the instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from re2tal.annotations import Bins, Characteristics
from re2tal.detection.evaluation.matching import (
    Bools,
    Floats,
    Ints,
    Table,
    Tables,
    checked_levels,
    match,
    tabulate,
)
from re2tal.detection.segments import Detections, LabelledSegments


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """Instances, predictions, and their matches.

    Instances of zero length are left out, as in DETAD: nothing can overlap them. Predictions of
    classes without instances are left out too: they are not in the mean over classes with
    instances, nor among the top predictions, whose number is a multiple of the instances.

    Attributes:
        thresholds: `(K,)` tIoU thresholds.
        videos: names of the videos that the tables index.
        truth: G instances.
        found: P predictions by class, and within a class by falling score.
        counts: `(C,)` instances of each class.
        starts: `(C + 1,)` first prediction of each class: class c has `starts[c]` to
            `starts[c + 1] - 1`.
        matched: `(K, P)` index of the instance that a prediction matches, -1 for none.
        left_out: number of instances of zero length.
    """

    thresholds: Floats
    videos: tuple[str, ...]
    truth: Table
    found: Table
    counts: Ints
    starts: Ints
    matched: Ints
    left_out: int

    @property
    def ranks(self) -> Ints:
        """Rank of each prediction in its class, `(P,)`, from 0 on."""
        return np.arange(len(self.found)) - self.starts[self.found.labels]


def collect(
    truth: Mapping[str, LabelledSegments],
    predictions: Mapping[str, Detections],
    *,
    num_classes: int,
    thresholds: Sequence[float],
) -> Outcomes:
    """Match predictions with instances as ActivityNet's official evaluator does.

    By falling score (equal scores in their given order), each prediction takes the instance of
    greatest tIoU among those of its video and class that are free and reach the threshold.

    Args:
        truth: video id -> instances in seconds (maybe none), for every video.
        predictions: video id -> predictions in seconds; videos may be missing or unknown.
        num_classes: C; labels are 0 to C - 1.
        thresholds: K tIoU thresholds in (0, 1].

    Raises:
        ValueError: there is no instance with a length, or a label, segment, score or threshold is
            not valid.
    """
    levels = checked_levels(thresholds)
    tables = tabulate(truth, predictions, num_classes=num_classes)
    lengths = tables.actual.segments[:, 1] - tables.actual.segments[:, 0]
    actual = tables.actual[lengths > 0]
    if len(actual) == 0:
        raise ValueError(
            f"There is no instance with a length in any of the {len(truth)} videos, so there is "
            "nothing to diagnose: check the subset and the class names."
        )
    counts = np.bincount(actual.labels, minlength=num_classes)
    found = tables.found[counts[tables.found.labels] > 0]
    compared = Tables(actual=actual, found=found, numbers=tables.numbers)
    pairs = compared.pairs(levels, instants=0.0)
    # `match` returns rows of `pairs`; turn them into the instance of each prediction.
    matched = np.full((len(levels), len(found)), -1, dtype=np.int64)
    taken = match(pairs, num_found=len(found), num_actual=len(actual), levels=levels)
    for of_level, rows in zip(matched, taken, strict=True):
        of_level[pairs.found[rows]] = pairs.actual[rows]
    return Outcomes(
        thresholds=levels,
        videos=tuple(tables.numbers),
        truth=actual,
        found=found,
        counts=counts,
        starts=np.searchsorted(found.labels, np.arange(num_classes + 1)),
        matched=matched,
        left_out=len(tables.actual) - len(actual),
    )


def normalised_precision(outcomes: Outcomes, hits: Bools, false: Bools, counts: Ints) -> Floats:
    """Compute precision after each prediction as if all classes had the average instance count.

    `P_N = R N / (R N + F)`, with N the average number of instances per class, R the recall of the
    class so far and F its false positives so far; 0 where both are 0. Plain precision has the
    class's own number of instances in place of N, which lowers it for rare classes with equally
    good detections (Hoiem et al., ECCV 2012).

    Args:
        outcomes: matched predictions and instances.
        hits: `(K, P)` mask of the true positives.
        false: `(K, P)` mask of the false positives. Predictions in neither have been removed.
        counts: `(C,)` instances that each class's recall refers to.

    Returns:
        `(K, P)`.
    """
    typical = len(outcomes.truth) / np.count_nonzero(outcomes.counts)  # N
    precision = np.zeros(hits.shape)
    for label in np.flatnonzero(counts):
        part = slice(outcomes.starts[label], outcomes.starts[label + 1])
        weight = hits[:, part].cumsum(axis=1) * (typical / counts[label])  # R N
        total = weight + false[:, part].cumsum(axis=1)
        np.divide(weight, total, out=precision[:, part], where=total > 0)
    return precision


def average_precision(outcomes: Outcomes, hits: Bools, false: Bools, counts: Ints) -> Floats:
    """Compute normalised average precision AP_N: the area under interpolated P_N over recall.

    See `normalised_precision` for the arguments.

    Returns:
        `(K, C)`; NaN for classes without instances, 0 for those without predictions.
    """
    precision = normalised_precision(outcomes, hits, false, counts)
    area = np.full((len(hits), len(counts)), np.nan)
    for label in np.flatnonzero(counts):
        part = slice(outcomes.starts[label], outcomes.starts[label + 1])
        # Interpolation: at each recall, the greatest precision at this recall or a higher one.
        best = np.maximum.accumulate(precision[:, part][:, ::-1], axis=1)[:, ::-1]
        area[:, label] = np.where(hits[:, part], best, 0.0).sum(axis=1) / counts[label]
    return area


def mean_average_precision(
    outcomes: Outcomes, hits: Bools, false: Bools, counts: Ints | None = None
) -> Floats:
    """Compute mAP_N `(K,)`: mean AP_N of the classes with instances in `counts` (default: all)."""
    counts = outcomes.counts if counts is None else counts
    if not counts.any():
        return np.full(len(hits), np.nan)
    of_class = average_precision(outcomes, hits, false, counts)
    mean: Floats = of_class[:, counts > 0].mean(axis=1)
    return mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """One characteristic of every instance.

    Attributes:
        bins: bins of the characteristic.
        index: `(G,)` bin of each instance.
    """

    bins: Bins
    index: Ints

    @property
    def counts(self) -> Ints:
        """Number of instances in each bin, `(B,)`."""
        return np.bincount(self.index, minlength=len(self.bins.names))


def characterise(
    outcomes: Outcomes, durations: Mapping[str, float], characteristics: Characteristics
) -> dict[str, Placed]:
    """Assign every instance to its bin of each characteristic.

    Args:
        outcomes: matched instances.
        durations: video id -> duration in seconds, for every video with instances.
        characteristics: bins of each characteristic.

    Returns:
        Name -> bins, in the order coverage, length, instances.

    Raises:
        ValueError: the duration of a video with instances is missing or not positive.
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
