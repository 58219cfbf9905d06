"""How mAP changes with the characteristics of the instances."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from re2tal.detection.diagnosis.characteristics import Placed
from re2tal.detection.diagnosis.normalised import mean_average_precision
from re2tal.detection.diagnosis.outcomes import Bools, Floats, Outcomes


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """mAP_N over the bins of one characteristic.

    Attributes:
        mAP: `(K, B)` mAP_N of each bin's instances alone; nan for bins without any.
        base: `(K,)` mAP_N of all instances.
    """

    mAP: Floats  # noqa: N815 - the field writes it so
    base: Floats

    @property
    def average(self) -> Floats:
        """`(B,)` average-mAP_N: the mean over the thresholds."""
        return self.mAP.mean(axis=0)

    @property
    def relative(self) -> Floats:
        """`(B,)` average-mAP_N of each bin, divided by that of all instances; nan if that is 0."""
        base = self.base.mean()
        return self.average / base if base > 0 else np.full_like(self.average, np.nan)

    @property
    def sensitivity(self) -> float:
        """Difference between the best and the worst bin's average-mAP_N."""
        return float(np.nanmax(self.average) - np.nanmin(self.average))

    @property
    def impact(self) -> float:
        """What average-mAP_N would gain if all instances were found as well as the best bin's."""
        return float(np.nanmax(self.average) - self.base.mean())


def base_map(outcomes: Outcomes) -> Floats:
    """mAP_N `(K,)` of all predictions and instances."""
    return mean_average_precision(outcomes, outcomes.matched >= 0, outcomes.matched < 0)


def sensitivity(outcomes: Outcomes, placed: Placed, base: Floats) -> Sensitivity:
    """mAP_N of the instances of each bin, as DETAD defines it.

    Recall refers to the bin's instances. Predictions that have found an instance of another bin,
    at whatever threshold, are removed; all others that have found none are false positives. The
    mean is taken over the classes that the bin has.

    Args:
        outcomes: instances and predictions.
        placed: the bin of each instance.
        base: `(K,)` mAP_N of all instances.
    """
    of_bins = [
        _map_of(outcomes, placed.index == number) for number in range(len(placed.bins.names))
    ]
    return Sensitivity(mAP=np.stack(of_bins, axis=1), base=base)


def _map_of(outcomes: Outcomes, inside: Bools) -> Floats:
    """mAP_N `(K,)` of the instances that are `inside` `(G,)`."""
    matched = outcomes.matched
    # The entry that -1 points to stands for predictions that found nothing: they stay.
    kept = np.append(inside, True)[matched].all(axis=0)
    counts = np.bincount(outcomes.truth.labels[inside], minlength=len(outcomes.counts))
    return mean_average_precision(outcomes, (matched >= 0) & kept, (matched < 0) & kept, counts)
