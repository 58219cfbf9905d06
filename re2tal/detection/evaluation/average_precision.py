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

THUMOS-14 marks segments as ambiguous: an action or not, the annotators could not tell. Its own
toolkit (TH14evalDet) takes from the false positives what shares any time at all with such a
segment of its video, whatever the class; true positives stay, and missed ambiguous segments cost
nothing. `ambiguous` does just that. Matching and averaging remain ActivityNet's, which is how the
field evaluates THUMOS-14: that toolkit lets each instance pick the prediction that overlaps it
most, whatever the score, and leaves the curve uninterpolated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from re2tal.detection.evaluation.matching import checked_levels, match, overlapping
from re2tal.detection.evaluation.tables import Bools, Floats, Tables, tabulate, tabulate_segments
from re2tal.detection.segments import Detections, LabelledSegments


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
    ambiguous: Mapping[str, Tensor] | None = None,
    exclude: Collection[str] = (),
) -> MapResult:
    """Average precision of `predictions` (definition: module docstring).

    Computed in float64. Reversed segments count as zero-length ones. Scores may be infinite.

    Args:
        truth: of every video of the evaluated subset, its instances (maybe none). The unit of
            the segments must be that of the predictions, usually seconds.
        predictions: by video; videos may be missing or unknown. Without any, the result is 0.
        num_classes: C; labels are 0 to C - 1.
        thresholds: K tIoU thresholds above 0.
        ambiguous: by video, segments `(M, 2)` where false positives do not count.
        exclude: videos that count neither in `truth` nor in `predictions`, say because their
            annotation is wrong; they need not occur there.

    Returns:
        The result per threshold and class.

    Raises:
        ValueError: If there is no ground truth at all, a label is not in range, a score is not a
            number, a segment is not finite or a threshold is not in (0, 1].
    """
    levels = checked_levels(thresholds)
    tables = tabulate(truth, predictions, num_classes=num_classes, exclude=exclude)
    actual, found = tables.actual, tables.found
    pairs = overlapping(
        (found.segments, found.videos * num_classes + found.labels),
        (actual.segments, actual.videos * num_classes + actual.labels),
        least=float(levels.min()),
        instants=np.inf,
    )
    hits = match(pairs, num_found=len(found), num_actual=len(actual), levels=levels) >= 0
    counted = hits | ~_touching(tables, ambiguous or {})

    by_class = np.argsort(found.labels, kind="stable")
    starts = np.searchsorted(found.labels[by_class], np.arange(num_classes + 1))
    counts = np.bincount(actual.labels, minlength=num_classes)
    per_class = np.full((len(levels), num_classes), np.nan)
    for label in np.flatnonzero(counts):
        rows = by_class[starts[label] : starts[label + 1]]
        per_class[:, label] = _interpolated_average_precision(
            hits[:, rows], counted[:, rows], counts[label]
        )
    means = np.nanmean(per_class, axis=1)
    return MapResult(thresholds=levels, per_class=per_class, mAP=means, average=float(means.mean()))


def _touching(tables: Tables, ambiguous: Mapping[str, Tensor]) -> Bools:
    """Which predictions `(P,)` share time with an ambiguous segment of their video."""
    known = {video: part for video, part in ambiguous.items() if video in tables.numbers}
    touching = np.zeros(len(tables.found), dtype=bool)
    pairs = overlapping(
        (tables.found.segments, tables.found.videos),
        tabulate_segments(known, tables.numbers, what="ambiguous segments"),
        least=np.nextafter(0.0, 1.0),
        instants=0.0,
    )
    touching[pairs.found] = True
    return touching


def _interpolated_average_precision(hits: Bools, counted: Bools, count: int) -> Floats:
    """Area under the interpolated precision-recall curve.

    Args:
        hits: `(K, P)` whether each prediction, by falling score, is a true positive.
        counted: `(K, P)` whether it is a true or a false positive.
        count: instances in the ground truth, at least one.

    Returns:
        `(K,)` average precision.
    """
    precision = hits.cumsum(axis=1) / counted.cumsum(axis=1).clip(min=1)
    # Interpolation: at each recall the best precision at that recall or a higher one.
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return np.where(hits, best, 0.0).sum(axis=1) / count
