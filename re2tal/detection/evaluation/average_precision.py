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

from re2tal.detection.evaluation.tables import (
    Floats,
    Ints,
    Tables,
    checked_levels,
    match,
    overlapping,
    tabulate,
    tabulate_segments,
)
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
    of_found, of_actual = tables.groups()
    pairs = overlapping(
        (found.segments, of_found),
        (actual.segments, of_actual),
        least=float(levels.min()),
        instants=np.inf,
    )
    ignored = _touching(tables, ambiguous or {})
    starts = np.searchsorted(found.labels, np.arange(num_classes + 1))
    counts = np.bincount(actual.labels, minlength=num_classes)
    taken = match(pairs, num_found=len(found), num_actual=len(actual), levels=levels)
    per_class = np.stack(
        [
            _average_precision(np.sort(pairs.found[of_level]), ignored, starts, counts)
            for of_level in taken
        ]
    )
    means = np.nanmean(per_class, axis=1)
    return MapResult(thresholds=levels, per_class=per_class, mAP=means, average=float(means.mean()))


def _touching(tables: Tables, ambiguous: Mapping[str, Tensor]) -> Ints:
    """Which predictions share time with an ambiguous segment of their video, by row."""
    known = {video: part for video, part in ambiguous.items() if video in tables.numbers}
    pairs = overlapping(
        (tables.found.segments, tables.found.videos),
        tabulate_segments(known, tables.numbers, what="ambiguous segments"),
        least=np.nextafter(0.0, 1.0),
        instants=0.0,
    )
    return np.unique(pairs.found)


def _average_precision(hits: Ints, ignored: Ints, starts: Ints, counts: Ints) -> Floats:
    """Area under the interpolated precision-recall curve of each class.

    Only true positives matter, and how many predictions were visited when each was found: between
    two of them recall stands still and precision falls.

    Args:
        hits: rows of the true positives, rising, in a table by class and falling score.
        ignored: rows that do not count unless they are `hits`, rising.
        starts: `(C + 1,)` rows where the classes start.
        counts: `(C,)` instances in the ground truth.

    Returns:
        `(C,)` average precision; nan without ground truth.
    """
    label = np.searchsorted(starts, hits, side="right") - 1
    bounds = np.searchsorted(hits, starts)
    found = np.arange(1, len(hits) + 1) - bounds[label]
    skipped = np.setdiff1d(ignored, hits, assume_unique=True)
    earlier = np.searchsorted(skipped, hits) - np.searchsorted(skipped, starts)[label]
    precision = found / (hits - starts[label] + 1 - earlier)
    area = np.full(len(counts), np.nan)
    for of_class in np.flatnonzero(counts):
        part = precision[bounds[of_class] : bounds[of_class + 1]]
        # Interpolation: at each recall the best precision at that recall or a higher one.
        area[of_class] = np.maximum.accumulate(part[::-1]).sum() / counts[of_class]
    return area
