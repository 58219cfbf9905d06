"""Which instances no prediction finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from re2tal.detection.diagnosis.characteristics import Placed
from re2tal.detection.diagnosis.normalised import normalised_precision
from re2tal.detection.diagnosis.outcomes import Bools, Floats, Ints, Outcomes

MIN_PRECISION = 0.05
"""Predictions from where normalised precision is this low or lower find nothing (DETAD)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Missed:
    """Instances by bin, and the share of them that is missed.

    Attributes:
        counts: `(*B)` instances in each bin (of one characteristic), or in each pair of bins.
        shares: `(K, *B)` the share that is missed at each threshold; nan for empty bins.
    """

    counts: Ints
    shares: Floats

    @property
    def average(self) -> Floats:
        """`(*B)` mean share over the thresholds."""
        return self.shares.mean(axis=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FalseNegatives:
    """The instances that are missed.

    Attributes:
        overall: `(K,)` share of all instances.
        by: characteristic to the shares in its bins `(B,)`.
        by_pair: two characteristics to the shares in their pairs of bins `(B1, B2)`.
    """

    overall: Floats
    by: Mapping[str, Missed]
    by_pair: Mapping[tuple[str, str], Missed]


def false_negatives(outcomes: Outcomes, placed: Mapping[str, Placed]) -> FalseNegatives:
    """Counts the missed instances by bin, as DETAD does.

    An instance is missed when no prediction has found it, or only one at whose rank in its class
    normalised precision is at most 0.05: any detector finds everything if it may guess forever.

    Args:
        outcomes: instances and predictions.
        placed: of each characteristic, the bin of each instance.
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
    """Whether each instance is missed: `(K, G)`."""
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
    return _shares(missed, first.index * shape[1] + second.index, shape)


def _shares(missed: Bools, index: Ints, shape: tuple[int, ...]) -> Missed:
    """Groups `missed` `(K, G)` by flat bin `index` `(G,)` into bins of `shape`."""
    size = int(np.prod(shape))
    counts = np.bincount(index, minlength=size)
    sums = np.stack([np.bincount(index, weights=row, minlength=size) for row in missed])
    shares = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return Missed(counts=counts.reshape(shape), shares=shares.reshape(-1, *shape))
