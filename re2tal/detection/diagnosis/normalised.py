"""Average precision that does not depend on how common a class is."""

from __future__ import annotations

import numpy as np

from re2tal.detection.diagnosis.outcomes import Bools, Floats, Ints, Outcomes


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
