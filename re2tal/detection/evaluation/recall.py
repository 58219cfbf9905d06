"""Recall of detections with a budget per instance: Recall@kx of Ego4D's Moment Queries.

In a video with n instances of a class, the k n predictions of that class with the highest scores
are looked at. An instance is found if one of them overlaps it by at least the threshold; one
prediction may find several instances. A class's recall is the part of its instances, in all
videos, that are found, and the mean over the classes that have instances is reported
(Grauman et al., Ego4D, CVPR 2022, appendix on Moment Queries; the field reports k = 1 at tIoU 0.5).

Unlike in average precision, segments without length find nothing here, and other videos' scores
do not matter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from re2tal.detection.evaluation.matching import checked_levels, first_ranks, overlapping
from re2tal.detection.evaluation.tables import Floats, tabulate
from re2tal.detection.segments import Detections, LabelledSegments


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassRecall:
    """Recall by class, threshold and number of predictions per instance.

    Attributes:
        thresholds: `(K,)` tIoU thresholds.
        ks: Q numbers of predictions per instance.
        per_class: `(K, Q, C)` recall in [0, 1]; nan for classes without ground truth.
        recall: `(K, Q)` mean over the classes that have ground truth.
    """

    thresholds: Floats
    ks: tuple[int, ...]
    per_class: Floats
    recall: Floats


def recall_at(
    truth: Mapping[str, LabelledSegments],
    predictions: Mapping[str, Detections],
    *,
    num_classes: int,
    ks: Sequence[int] = (1, 5),
    thresholds: Sequence[float],
    exclude: Collection[str] = (),
) -> ClassRecall:
    """Recall@kx of `predictions` (definition: module docstring).

    Args:
        truth: of every video of the evaluated subset, its instances (maybe none), in the unit of
            the predictions.
        predictions: by video; videos may be missing or unknown.
        num_classes: C; labels are 0 to C - 1.
        ks: how many predictions are looked at per instance, each at least 1.
        thresholds: K tIoU thresholds above 0.
        exclude: videos that do not count.

    Raises:
        ValueError: As `mean_average_precision`; or if `ks` are not positive.
    """
    levels = checked_levels(thresholds)
    budgets = np.asarray(ks, dtype=np.int64)
    if budgets.size == 0 or budgets.min() < 1:
        raise ValueError(f"Recall@kx needs every k to be at least 1, but ks are {list(ks)}.")
    tables = tabulate(truth, predictions, num_classes=num_classes, exclude=exclude)
    actual, found = tables.actual, tables.found
    of_found, of_actual = tables.groups()
    pairs = overlapping(
        (found.segments, of_found),
        (actual.segments, of_actual),
        least=float(levels.min()),
        instants=0.0,
    )
    first = first_ranks(pairs, of_found, num_actual=len(actual), levels=levels)  # (K, N)
    _, group, members = np.unique(of_actual, return_inverse=True, return_counts=True)
    hits = first[:, None] < budgets[:, None] * members[group]  # (K, Q, N)

    per_class = np.full((*hits.shape[:2], num_classes), np.nan)
    for label in np.unique(actual.labels):
        per_class[..., label] = hits[..., actual.labels == label].mean(axis=2)
    return ClassRecall(
        thresholds=levels,
        ks=tuple(int(k) for k in budgets),
        per_class=per_class,
        recall=np.nanmean(per_class, axis=2),
    )
