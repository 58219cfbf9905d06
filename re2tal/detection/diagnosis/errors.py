"""Error analysis: kinds of false positives, missed instances, and sensitivity of mAP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import combinations

import numpy as np

from re2tal.detection.diagnosis.outcomes import (
    Outcomes,
    Placed,
    mean_average_precision,
    normalised_precision,
)
from re2tal.detection.evaluation.matching import Bools, Floats, Ints, overlapping

MIN_PRECISION = 0.05
"""Normalised precision up to which a match does not count as finding its instance (DETAD)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Missed:
    """Instances by bin, and the missed share of them.

    Attributes:
        counts: `(*B)` instances in each bin (of one characteristic), or in each pair of bins.
        shares: `(K, *B)` missed share at each threshold; NaN for empty bins.
    """

    counts: Ints
    shares: Floats

    @property
    def average(self) -> Floats:
        """Mean share over the thresholds, `(*B)`."""
        mean: Floats = self.shares.mean(axis=0)
        return mean


@dataclass(frozen=True, kw_only=True, slots=True)
class FalseNegatives:
    """Shares of missed instances.

    Attributes:
        overall: `(K,)` share of all instances.
        by: characteristic -> shares in its bins `(B,)`.
        by_pair: two characteristics -> shares in their pairs of bins `(B1, B2)`.
    """

    overall: Floats
    by: Mapping[str, Missed]
    by_pair: Mapping[tuple[str, str], Missed]


def false_negatives(outcomes: Outcomes, placed: Mapping[str, Placed]) -> FalseNegatives:
    """Count the missed instances by bin, as DETAD does.

    An instance is missed if no prediction matches it, or if the normalised precision at the rank of
    the matching prediction is at most 0.05: with enough guesses any detector finds everything.
    `placed` holds, for each characteristic, the bin of each instance.
    """
    missed = _missed(outcomes)
    return FalseNegatives(
        overall=missed.mean(axis=1),
        by={name: _by_bin(missed, one) for name, one in placed.items()},
        by_pair={
            (first, second): _by_pair(missed, placed[first], placed[second])
            for first, second in combinations(placed, 2)
        },
    )


def _missed(outcomes: Outcomes) -> Bools:
    """Mask `(K, G)` of the missed instances."""
    hits = outcomes.matched >= 0
    precision = normalised_precision(outcomes, hits, ~hits, outcomes.counts)
    level, row = np.nonzero(hits & (precision > MIN_PRECISION))
    missed = np.ones((len(hits), len(outcomes.truth)), dtype=bool)
    missed[level, outcomes.matched[level, row]] = False
    return missed


def _by_bin(missed: Bools, placed: Placed) -> Missed:
    return _shares(missed, placed.index, (len(placed.bins.names),))


def _by_pair(missed: Bools, first: Placed, second: Placed) -> Missed:
    shape = (len(first.bins.names), len(second.bins.names))
    return _shares(missed, first.index * shape[1] + second.index, shape)  # row-major index


def _shares(missed: Bools, index: Ints, shape: tuple[int, ...]) -> Missed:
    """Group `missed` `(K, G)` by flat bin `index` `(G,)` into bins of `shape`."""
    size = int(np.prod(shape))
    counts = np.bincount(index, minlength=size)
    sums = np.stack([np.bincount(index, weights=row, minlength=size) for row in missed])
    shares = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return Missed(counts=counts.reshape(shape), shares=shares.reshape(-1, *shape))


MIN_OVERLAP = 0.1
"""A false positive is background if its greatest tIoU with an instance is below this (DETAD)."""

GROUPS = 10
"""Number of predictions per instance in the profile of false positives (DETAD: the top 10G)."""


class Kind(IntEnum):
    """Kind of a prediction at a tIoU threshold t (the definitions of DETAD).

    A true positive matches an instance. For other predictions, let o be the greatest tIoU with any
    instance of the video, whatever its class; the nearest instance is the one that reaches o:

    - double detection: o >= t, and the nearest instance has the predicted class (a prediction of
      higher score matches it);
    - wrong label: o >= t, and the nearest instance is of another class;
    - localization: 0.1 <= o < t, and the nearest instance has the predicted class;
    - confusion: 0.1 <= o < t, and the nearest instance is of another class;
    - background: o < 0.1.

    On ties the first instance is the nearest. (In a video without instances, DETAD's published code
    compares all predictions but the first with the instances of another video; here they are all
    background.)
    """

    TRUE_POSITIVE = 0
    DOUBLE_DETECTION = 1
    WRONG_LABEL = 2
    LOCALIZATION = 3
    CONFUSION = 4
    BACKGROUND = 5


ERRORS = tuple(kind for kind in Kind if kind is not Kind.TRUE_POSITIVE)


@dataclass(frozen=True, kw_only=True, slots=True)
class FalsePositives:
    """Profile of the top predictions.

    For a class with G_c instances, group i holds the predictions of ranks i G_c to
    (i + 1) G_c - 1: the top 1G, the next 1G, and so on up to 10G.

    Attributes:
        counts: `(K, 10, 6)` number of predictions by threshold, group and kind.
        base: `(K,)` mAP_N of the top 10G predictions.
        gains: `(K, 5)` gain of mAP_N when all top predictions of one kind of error are removed.
    """

    counts: Ints
    base: Floats
    gains: Floats

    @property
    def shares(self) -> Floats:
        """Share of each kind among a group's predictions, `(K, 10, 6)`; NaN in empty groups."""
        total = self.counts.sum(axis=2, keepdims=True)
        return np.where(total > 0, self.counts / np.maximum(total, 1), np.nan)


def false_positives(outcomes: Outcomes) -> FalsePositives:
    """Profile the top predictions of every class; measure the gain of removing each error kind."""
    groups = outcomes.ranks // outcomes.counts[outcomes.found.labels]
    top = groups < GROUPS
    kinds = classify(outcomes, top)
    counts = np.zeros((len(kinds), GROUPS, len(Kind)), dtype=np.int64)
    for level, of_level in enumerate(kinds):
        np.add.at(counts[level], (groups[top], of_level[top]), 1)
    hits = kinds == Kind.TRUE_POSITIVE
    false = top & ~hits
    hits &= top
    base = mean_average_precision(outcomes, hits, false)
    gains = [
        mean_average_precision(outcomes, hits, false & (kinds != kind)) - base for kind in ERRORS
    ]
    return FalsePositives(counts=counts, base=base, gains=np.stack(gains, axis=1))


def classify(outcomes: Outcomes, wanted: Bools) -> Ints:
    """Classify the predictions in the mask `wanted` `(P,)` at each threshold.

    Returns:
        `(K, P)` values of `Kind`; outside `wanted`, false positives are all labelled background.
    """
    kinds = np.full(outcomes.matched.shape, int(Kind.BACKGROUND), dtype=np.int64)
    rows = np.flatnonzero(wanted & (outcomes.matched < 0).any(axis=0))
    overlap, same = _nearest(outcomes, rows)
    levels = outcomes.thresholds[:, None]
    near = np.where(same, int(Kind.LOCALIZATION), int(Kind.CONFUSION))
    found = np.where(same, int(Kind.DOUBLE_DETECTION), int(Kind.WRONG_LABEL))
    below = np.where(overlap >= MIN_OVERLAP, near, int(Kind.BACKGROUND))
    kinds[:, rows] = np.where(overlap >= levels, found, below)
    kinds[outcomes.matched >= 0] = Kind.TRUE_POSITIVE  # last: it overrides all others
    return kinds


def _nearest(outcomes: Outcomes, rows: Ints) -> tuple[Floats, Bools]:
    """Find the nearest instance of each prediction in `rows`.

    Returns:
        Greatest tIoU `(R,)`, 0 if below all limits; mask `(R,)` of nearest instances of the same
        class.
    """
    found, truth = outcomes.found[rows], outcomes.truth
    pairs = overlapping(
        (found.segments, found.videos),
        (truth.segments, truth.videos),
        least=min(MIN_OVERLAP, float(outcomes.thresholds.min())),
        instants=0.0,
    )
    by_overlap = np.lexsort((-pairs.overlap, pairs.found))  # on ties the first instance
    row, first = np.unique(pairs.found[by_overlap], return_index=True)
    best = by_overlap[first]
    overlap, same = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    overlap[row] = pairs.overlap[best]
    same[row] = truth.labels[pairs.actual[best]] == found.labels[row]
    return overlap, same


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """mAP_N over the bins of one characteristic.

    Attributes:
        mAP: `(K, B)` mAP_N of each bin's instances alone; NaN for empty bins.
        base: `(K,)` mAP_N of all instances.
    """

    mAP: Floats  # noqa: N815 - the field writes it so
    base: Floats

    @property
    def average(self) -> Floats:
        """Average-mAP_N `(B,)`: the mean over the thresholds."""
        mean: Floats = self.mAP.mean(axis=0)
        return mean

    @property
    def relative(self) -> Floats:
        """Average-mAP_N of each bin, divided by that of all instances, `(B,)`; NaN if that is 0."""
        base = self.base.mean()
        return self.average / base if base > 0 else np.full_like(self.average, np.nan)

    @property
    def sensitivity(self) -> float:
        """Difference between the best and the worst bin's average-mAP_N."""
        return float(np.nanmax(self.average) - np.nanmin(self.average))

    @property
    def impact(self) -> float:
        """Gain of average-mAP_N if all instances were found as well as those of the best bin."""
        return float(np.nanmax(self.average) - self.base.mean())


def base_map(outcomes: Outcomes) -> Floats:
    """Compute mAP_N `(K,)` of all predictions and instances."""
    return mean_average_precision(outcomes, outcomes.matched >= 0, outcomes.matched < 0)


def sensitivity(outcomes: Outcomes, placed: Placed, base: Floats) -> Sensitivity:
    """Compute mAP_N of the instances of each bin, as DETAD defines it.

    Recall refers to the bin's instances. Predictions that match an instance of another bin at any
    threshold are removed; all other predictions without a match are false positives. The mean is
    over the classes that occur in the bin.

    Args:
        outcomes: instances and predictions.
        placed: bin of each instance.
        base: `(K,)` mAP_N of all instances.
    """
    of_bins = [
        _map_of(outcomes, placed.index == number) for number in range(len(placed.bins.names))
    ]
    return Sensitivity(mAP=np.stack(of_bins, axis=1), base=base)


def _map_of(outcomes: Outcomes, inside: Bools) -> Floats:
    """Compute mAP_N `(K,)` of the instances in the mask `inside` `(G,)`."""
    matched = outcomes.matched
    # Index -1, no match, selects the appended entry: predictions without a match are kept.
    kept = np.append(inside, True)[matched].all(axis=0)
    counts = np.bincount(outcomes.truth.labels[inside], minlength=len(outcomes.counts))
    return mean_average_precision(outcomes, (matched >= 0) & kept, (matched < 0) & kept, counts)
