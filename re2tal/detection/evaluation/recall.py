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

from re2tal.detection.evaluation.tables import (
    Floats,
    Ints,
    checked_levels,
    first_ranks,
    overlapping,
    tabulate,
)
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


_THRESHOLDS = tuple(float(level) for level in np.linspace(0.5, 0.95, 10))


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposalRecall:
    """Recall of proposals by their average number.

    Attributes:
        thresholds: `(K,)` tIoU thresholds.
        recall: `(K, A)` part of the instances found with 1, 2, ..., A proposals a video.
        average_recall: `(A,)` mean over the thresholds; AR@n is `average_recall[n - 1]`.
        proposals_per_video: `(A,)` the numbers of proposals, 1 to A (up to rounding).
        auc: area under `average_recall`, in percent.
    """

    thresholds: Floats
    recall: Floats
    average_recall: Floats
    proposals_per_video: Floats
    auc: float


def average_recall(
    truth: Mapping[str, LabelledSegments],
    proposals: Mapping[str, Detections],
    *,
    max_average: int = 100,
    thresholds: Sequence[float] = _THRESHOLDS,
    exclude: Collection[str] = (),
) -> ProposalRecall:
    """Average recall of `proposals` (definition: module docstring).

    Args:
        truth: of every video of the evaluated subset, its instances (maybe none), in the unit of
            the proposals.
        proposals: by video; videos may be missing or unknown.
        max_average: A, the largest average number of proposals. All from 1 to A are evaluated;
            for A = 100 these are the 100 points of the official curve.
        thresholds: K tIoU thresholds above 0.
        exclude: videos that do not count.

    Raises:
        ValueError: If there is no ground truth, a segment is not finite, a score is not a
            number, or `max_average` or a threshold is out of range.
    """
    levels = checked_levels(thresholds)
    if max_average < 1:
        raise ValueError(f"max_average must be at least 1, but is {max_average}.")
    tables = tabulate(truth, proposals, exclude=exclude)
    actual, found = tables.actual, tables.found
    videos, of_actual = np.unique(actual.videos, return_inverse=True)
    available = np.bincount(found.videos, minlength=len(tables.numbers))[videos]
    kept, numbers = _budgets(available, len(found), max_average)
    pairs = overlapping(
        (found.segments, found.videos),
        (actual.segments, actual.videos),
        least=float(levels.min()),
        instants=0.0,
    )
    first = first_ranks(pairs, found.videos, num_actual=len(actual), levels=levels)
    recall = np.stack([(of_level[:, None] < kept[of_actual]).mean(axis=0) for of_level in first])
    average = recall.mean(axis=0)
    return ProposalRecall(
        thresholds=levels,
        recall=recall,
        average_recall=average,
        proposals_per_video=numbers,
        auc=100.0 * float(np.trapezoid(average, numbers)) / float(numbers[-1]),
    )


def _budgets(available: Ints, total: int, most: int) -> tuple[Ints, Floats]:
    """How many proposals each video keeps at each average number.

    The order of the products and the cuts to integers are the official code's, since they decide.

    Args:
        available: `(V,)` proposals of each video with ground truth.
        total: proposals of all videos.
        most: A, the largest average number.

    Returns:
        `(V, A)` kept proposals and `(A,)` average numbers.
    """
    steps = np.arange(1, most + 1)
    share = most * float(len(available)) / total if total else 0.0
    cut = np.minimum((available * share).astype(np.int64), available)
    if cut.sum() == 0:
        return np.zeros((len(available), most), dtype=np.int64), steps.astype(np.float64)
    shares = steps / most * (most * float(len(available)) / cut.sum())
    kept = np.minimum((cut[:, None] * shares).astype(np.int64), cut[:, None])
    return kept, shares * (float(cut.sum()) / len(available))
