"""Mean average precision, AR@AN of proposals and Recall@kx, and the table of these metrics.

Each function states its definition, and follows the code of the metric's benchmark in details that
its description leaves open. Training and `evaluate.py` compute, log, print and write every metric
in the table `METRICS` at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from re2tal.detection.evaluation.matching import (
    Floats,
    Ints,
    Tables,
    checked_levels,
    first_ranks,
    match,
    overlapping,
    tabulate,
    tabulate_segments,
)
from re2tal.detection.segments import Detections, LabelledSegments

Row = dict[str, str | int | float | None]
"""Row of a table: column name -> value."""


def _row(head: Row, thresholds: Floats, values: Floats) -> Row:
    """Return a row: `head`, the mean and a value for each threshold; None for NaN."""
    numbers = {
        "average": values.mean(),
        **{f"tIoU {float(t):.2f}": value for t, value in zip(thresholds, values, strict=True)},
    }
    return head | {
        name: float(value) if np.isfinite(value) else None for name, value in numbers.items()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class MapResult:
    """Average precision by class and threshold.

    Attributes:
        thresholds: `(K,)` tIoU thresholds.
        per_class: `(K, C)` average precision in [0, 1]; NaN for classes without ground truth.
        instances: `(C,)` number of instances in the ground truth.
        mAP: `(K,)` mean over the classes that have ground truth.
        average: mean over the thresholds.
    """

    thresholds: Floats
    per_class: Floats
    instances: Ints
    mAP: Floats  # noqa: N815 - the field writes it so
    average: float

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """Return `mAP` (the average), `mAP/tiou_0.50`, ..., and `AP/<class>` where it is defined.

        Args:
            names: C class names, all different.
        """
        metrics = {"mAP": self.average}
        for threshold, value in zip(self.thresholds, self.mAP, strict=True):
            metrics[f"mAP/tiou_{float(threshold):.2f}"] = float(value)
        for name, value in zip(names, self.per_class.mean(0), strict=True):
            if np.isfinite(value):  # a class without ground truth has no AP
                metrics[f"AP/{name}"] = float(value)
        return metrics

    def rows(self, classes: Sequence[str]) -> list[Row]:
        """Return a row per class (class, instances, average, thresholds), then the row of mAP."""
        rows = [
            _row({"class": name, "instances": int(count)}, self.thresholds, values)
            for name, count, values in zip(classes, self.instances, self.per_class.T, strict=True)
        ]
        whole: Row = {"class": "mAP", "instances": int(self.instances.sum())}
        return [*rows, _row(whole, self.thresholds, self.mAP)]

    def lines(self) -> Iterator[str]:
        """Return no lines: the rows are printed instead."""
        return iter(())


def mean_average_precision(
    truth: Mapping[str, LabelledSegments],
    predictions: Mapping[str, Detections],
    *,
    num_classes: int,
    thresholds: Sequence[float],
    ambiguous: Mapping[str, Tensor] | None = None,
    exclude: Collection[str] = (),
) -> MapResult:
    """Mean average precision of detections, as ActivityNet's official evaluator defines it.

    For one class and one tIoU threshold, predictions of all videos are visited by falling score.
    Each prediction takes, among the instances of its video and class that are free and overlap it
    by at least the threshold, the one with the greatest tIoU. (So a prediction whose best instance
    is taken gets its next best, unlike in Pascal VOC.) If there is none, it is a false positive.
    Average precision is the area under the interpolated precision-recall curve. mAP is the mean
    over the classes that have ground truth.

    Details that the definition leaves open, and their treatment here:

    - Equal scores are visited in the order of `predictions` and of each video's detections (the
      official code's order is arbitrary). Of instances with equal tIoU the first is taken.
    - Segments are not clipped to a video's duration. Duplicates in the ground truth stay, and each
      of them has to be found.
    - Predictions in unknown videos, or in videos without ground truth of their class, are false
      positives.
    - Two zero-length segments of a class in one video match at every threshold, wherever they are,
      as in the official code (0/0). ActivityNet's validation set has three such instances.

    In THUMOS-14, segments are marked as ambiguous where the annotators were not sure of an action.
    Its own toolkit (TH14evalDet) ignores false positives that share any time with an ambiguous
    segment of their video, whatever the class. True positives stay, and a missed ambiguous segment
    costs nothing. `ambiguous` does the same. Matching and averaging remain those of ActivityNet, as
    is usual in the field: the toolkit instead lets each instance pick the prediction of greatest
    overlap, whatever its score, and does not interpolate the curve.

    Computed in float64. Reversed segments count as zero-length ones. Scores may be infinite.

    Args:
        truth: video id -> instances (maybe none), for every video of the evaluated subset, in the
            unit of the predictions, usually seconds.
        predictions: video id -> predictions; videos may be missing or unknown. Without any
            predictions, the result is 0.
        num_classes: C; labels are 0 to C - 1.
        thresholds: K tIoU thresholds above 0.
        ambiguous: video id -> segments `(M, 2)` where false positives do not count.
        exclude: ids of videos to leave out of `truth` and `predictions`, for example because their
            annotation is wrong; unknown ids are allowed.

    Returns:
        Average precision per threshold and class.

    Raises:
        ValueError: there is no ground truth at all, a label is out of range, a score is NaN, a
            segment is not finite, or a threshold is not in (0, 1].
    """
    levels = checked_levels(thresholds)
    tables = tabulate(truth, predictions, num_classes=num_classes, exclude=exclude)
    actual, found = tables.actual, tables.found
    pairs = tables.pairs(levels, instants=np.inf)
    ignored = _touching(tables, ambiguous or {})
    starts = np.searchsorted(found.labels, np.arange(num_classes + 1))  # labels are sorted
    counts = np.bincount(actual.labels, minlength=num_classes)
    taken = match(pairs, num_found=len(found), num_actual=len(actual), levels=levels)
    # `found` is ordered by class and score, so the rows of true positives give their ranks.
    per_class = np.stack(
        [
            _average_precision(np.sort(pairs.found[of_level]), ignored, starts, counts)
            for of_level in taken
        ]
    )
    means = np.nanmean(per_class, axis=1)
    return MapResult(
        thresholds=levels,
        per_class=per_class,
        instances=counts,
        mAP=means,
        average=float(means.mean()),
    )


def _touching(tables: Tables, ambiguous: Mapping[str, Tensor]) -> Ints:
    """Find the rows of predictions that share time with an ambiguous segment of their video."""
    known = {video: part for video, part in ambiguous.items() if video in tables.numbers}
    pairs = overlapping(
        (tables.found.segments, tables.found.videos),
        tabulate_segments(known, tables.numbers, what="ambiguous segments"),
        least=np.nextafter(0.0, 1.0),  # any overlap above 0
        instants=0.0,
    )
    return np.unique(pairs.found)


def _average_precision(hits: Ints, ignored: Ints, starts: Ints, counts: Ints) -> Floats:
    """Compute the area under the interpolated precision-recall curve of each class.

    AP is the sum of the interpolated precision at the true positives, divided by the number of
    instances: between two true positives, recall is constant and precision falls.

    Args:
        hits: sorted rows of the true positives in a table by class and falling score.
        ignored: sorted rows that are left out unless they are `hits`.
        starts: `(C + 1,)` first row of each class.
        counts: `(C,)` instances in the ground truth.

    Returns:
        `(C,)` average precision; NaN without ground truth.
    """
    label = np.searchsorted(starts, hits, side="right") - 1
    bounds = np.searchsorted(hits, starts)
    found = np.arange(1, len(hits) + 1) - bounds[label]  # true positives of the class so far
    skipped = np.setdiff1d(ignored, hits, assume_unique=True)
    # Ignored predictions of the class before each true positive.
    earlier = np.searchsorted(skipped, hits) - np.searchsorted(skipped, starts)[label]
    precision = found / (hits - starts[label] + 1 - earlier)  # over predictions visited so far
    area = np.full(len(counts), np.nan)
    for of_class in np.flatnonzero(counts):
        part = precision[bounds[of_class] : bounds[of_class + 1]]
        # Interpolation: at each recall, the greatest precision at this recall or a higher one.
        area[of_class] = np.maximum.accumulate(part[::-1]).sum() / counts[of_class]
    return area


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassRecall:
    """Recall by class, threshold and number of predictions per instance.

    Attributes:
        thresholds: `(K,)` tIoU thresholds.
        ks: Q numbers of predictions per instance.
        per_class: `(K, Q, C)` recall in [0, 1]; NaN for classes without ground truth.
        recall: `(K, Q)` mean over the classes that have ground truth.
    """

    thresholds: Floats
    ks: tuple[int, ...]
    per_class: Floats
    recall: Floats

    def metrics(self, names: Sequence[str]) -> dict[str, float]:  # noqa: ARG002 - not by class
        """Return `recall_1x` (the average), `recall_1x/tiou_0.50`, ...; MLflow rejects "@"."""
        metrics = {}
        for k, of_k in zip(self.ks, self.recall.T, strict=True):
            metrics[f"recall_{k}x"] = float(of_k.mean())
            for threshold, value in zip(self.thresholds, of_k, strict=True):
                metrics[f"recall_{k}x/tiou_{float(threshold):.2f}"] = float(value)
        return metrics

    def rows(self, classes: Sequence[str]) -> list[Row]:
        """Return a row per k and class (k, class, average, thresholds), and one with the mean."""
        return [
            _row({"k": k, "class": name}, self.thresholds, values)
            for place, k in enumerate(self.ks)
            for name, values in (
                *zip(classes, self.per_class[:, place].T, strict=True),
                ("mean", self.recall[:, place]),
            )
        ]

    def lines(self) -> Iterator[str]:
        """Return one line for each k."""
        for k, of_k in zip(self.ks, self.recall.T, strict=True):
            levels = zip(self.thresholds, of_k, strict=True)
            listed = ", ".join(f"tIoU {level:.2f} {value:.3f}" for level, value in levels)
            yield f"{f'recall@{k}x':<21}{listed}, average {of_k.mean():.3f}"


def recall_at(
    truth: Mapping[str, LabelledSegments],
    predictions: Mapping[str, Detections],
    *,
    num_classes: int,
    ks: Sequence[int] = (1, 5),
    thresholds: Sequence[float],
    exclude: Collection[str] = (),
) -> ClassRecall:
    """Recall of detections with a budget per instance: Recall@kx of Ego4D's Moment Queries.

    In a video with n instances of a class, only the k n predictions of that class with the highest
    scores count. An instance is found if one of them overlaps it by at least the threshold; one
    prediction may find several instances. A class's recall is the share of its instances, over all
    videos, that are found. The result is the mean over the classes that have instances (Grauman et
    al., Ego4D, CVPR 2022, appendix on Moment Queries; the field reports k = 1 at tIoU 0.5).

    Unlike in average precision, segments of zero length find nothing, and scores are not compared
    between videos.

    Args:
        truth: video id -> instances (maybe none), in the unit of the predictions, for every video
            of the evaluated subset.
        predictions: video id -> predictions; videos may be missing or unknown.
        num_classes: C; labels are 0 to C - 1.
        ks: numbers of predictions per instance, each at least 1.
        thresholds: K tIoU thresholds above 0.
        exclude: ids of videos to leave out.

    Raises:
        ValueError: `ks` are not positive, or `mean_average_precision` refuses the rest.
    """
    levels = checked_levels(thresholds)
    budgets = np.asarray(ks, dtype=np.int64)
    if budgets.size == 0 or budgets.min() < 1:
        raise ValueError(f"Recall@kx needs every k to be at least 1, but ks are {list(ks)}.")
    tables = tabulate(truth, predictions, num_classes=num_classes, exclude=exclude)
    actual = tables.actual
    of_found, of_actual = tables.groups()
    pairs = tables.pairs(levels, instants=0.0)
    first = first_ranks(pairs, of_found, num_actual=len(actual), levels=levels)  # (K, N)
    _, group, members = np.unique(of_actual, return_inverse=True, return_counts=True)
    # found if the first prediction that covers it is among the k n best: (K, Q, N)
    hits = first[:, None] < budgets[:, None] * members[group]

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
_SHOWN = (1, 5, 10, 100)  # AN of the logged and printed AR@AN


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposalRecall:
    """Recall of proposals by their average number.

    Attributes:
        thresholds: `(K,)` tIoU thresholds.
        recall: `(K, A)` share of the instances found with 1, 2, ..., A proposals per video.
        average_recall: `(A,)` mean over the thresholds; AR@n is `average_recall[n - 1]`.
        proposals_per_video: `(A,)` the numbers of proposals, 1 to A (up to rounding).
        auc: area under `average_recall`, in percent.
    """

    thresholds: Floats
    recall: Floats
    average_recall: Floats
    proposals_per_video: Floats
    auc: float

    def metrics(self, names: Sequence[str]) -> dict[str, float]:  # noqa: ARG002 - not by class
        """Return `AR/<AN>`, average recall with AN proposals per video, and `AR_AUC` in percent."""
        shown = {f"AR/{n}": float(self.average_recall[n - 1]) for n in _SHOWN}
        return {**shown, "AR_AUC": self.auc}

    def rows(self, classes: Sequence[str]) -> list[Row]:  # noqa: ARG002 - not by class
        """Return a row per number of proposals (proposals, average, thresholds)."""
        return [
            _row({"proposals": index + 1}, self.thresholds, self.recall[:, index])
            for index in range(len(self.average_recall))
        ]

    def lines(self) -> Iterator[str]:
        """Return one line."""
        numbers = (f"AR@{n} {self.average_recall[n - 1]:.3f}" for n in _SHOWN)
        yield f"average recall       {', '.join(numbers)}, area {self.auc:.1f} %"


def average_recall(
    truth: Mapping[str, LabelledSegments],
    proposals: Mapping[str, Detections],
    *,
    max_average: int = 100,
    thresholds: Sequence[float] = _THRESHOLDS,
    exclude: Collection[str] = (),
) -> ProposalRecall:
    """Average recall of proposals by their average number, as in ActivityNet's evaluator.

    Every video keeps the same percentage of its proposals, those with the highest scores, such that
    the average over videos is AN: videos with many proposals contribute more. AR@AN is the share
    of all instances that are overlapped by at least tIoU by one of their video's kept proposals,
    averaged over the thresholds. AUC is the area under AR over AN, divided by the largest AN, in
    percent. The curve starts at AN = 1, so perfect proposals reach 99 for the usual AN of 1 to 100.

    Labels do not matter, a proposal may find several instances, segments of zero length find
    nothing, and videos without ground truth are ignored. Further rules of the official code, which
    are followed here:

    - Every video's proposals are first cut to the percentage for the largest AN; then, of these, to
      the percentage for each AN. Both numbers are truncated to integers after products in float64,
      which may fall just below an integer: 29 % of 100 proposals are 28.
    - Proposals in videos without ground truth count in the first percentage, not in the second.
    - A video with fewer proposals than its share keeps all, and no other video gets the rest. So
      with fewer proposals than the largest AN, the curve is flat from their number on.

    Two details differ: proposals of equal score keep their order; without any proposals the result
    is 0, where the official code divides by zero.

    Args:
        truth: video id -> instances (maybe none), in the unit of the proposals, for every video of
            the evaluated subset.
        proposals: video id -> proposals; videos may be missing or unknown.
        max_average: A, the largest average number of proposals. All from 1 to A are evaluated;
            for A = 100 these are the 100 points of the official curve.
        thresholds: K tIoU thresholds above 0.
        exclude: ids of videos to leave out.

    Raises:
        ValueError: there is no ground truth, a segment is not finite, a score is NaN, or
            `max_average` or a threshold is out of range.
    """
    levels = checked_levels(thresholds)
    if max_average < 1:
        raise ValueError(f"max_average must be at least 1, but is {max_average}.")
    tables = tabulate(truth, proposals, exclude=exclude)
    actual, found = tables.actual, tables.found
    videos, of_actual = np.unique(actual.videos, return_inverse=True)
    available = np.bincount(found.videos, minlength=len(tables.numbers))[videos]
    kept, numbers = _budgets(available, len(found), max_average)
    pairs = tables.pairs(levels, instants=0.0)  # of a video: all labels are 0
    first = first_ranks(pairs, found.videos, num_actual=len(actual), levels=levels)
    # (N, 1) ranks < (N, A) budgets, for each threshold.
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
    """Compute the number of proposals that each video keeps at each average number.

    Products and truncations are in the official code's order, because the result depends on it.

    Args:
        available: `(V,)` proposals of each video with ground truth.
        total: proposals of all videos.
        most: A, the largest average number.

    Returns:
        `(V, A)` kept proposals and `(A,)` average numbers.
    """
    steps = np.arange(1, most + 1)
    share = most * float(len(available)) / total if total else 0.0
    cut = np.minimum((available * share).astype(np.int64), available)  # astype truncates
    if cut.sum() == 0:
        return np.zeros((len(available), most), dtype=np.int64), steps.astype(np.float64)
    shares = steps / most * (most * float(len(available)) / cut.sum())
    kept = np.minimum((cut[:, None] * shares).astype(np.int64), cut[:, None])
    return kept, shares * (float(cut.sum()) / len(available))


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """Detections and the ground truth that they are compared with, in seconds.

    Attributes:
        truth: video id to instances, for every video of the evaluated subset.
        predictions: video id to detections.
        proposals: video id to proposals, the detections before an external classifier assigned
            classes; None to skip the recall of proposals.
        num_classes: C; labels are 0 to C - 1.
        thresholds: K tIoU thresholds.
        ambiguous: video id to segments `(M, 2)` where false positives do not count.
        ks: each k of Recall@kx; empty if the data set's benchmark does not report it.
    """

    truth: Mapping[str, LabelledSegments]
    predictions: Mapping[str, Detections]
    proposals: Mapping[str, Detections] | None
    num_classes: int
    thresholds: Sequence[float]
    ambiguous: Mapping[str, Tensor] | None
    ks: Sequence[int]


class Result(Protocol):
    """Result of one metric."""

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """Return the numbers to log: metric name -> value; `names` are the class names."""
        ...

    def rows(self, classes: Sequence[str]) -> list[Row]:
        """Return the rows of the table to write; all have the same columns."""
        ...

    def lines(self) -> Iterator[str]:
        """Return the lines to print."""
        ...


METRICS: dict[str, Callable[[Compared], Result | None]] = {
    "average_precision": lambda compared: mean_average_precision(
        compared.truth,
        compared.predictions,
        num_classes=compared.num_classes,
        thresholds=compared.thresholds,
        ambiguous=compared.ambiguous,
    ),
    "average_recall": lambda compared: (
        None if compared.proposals is None else average_recall(compared.truth, compared.proposals)
    ),
    "instance_recall": lambda compared: (
        recall_at(
            compared.truth,
            compared.predictions,
            num_classes=compared.num_classes,
            ks=compared.ks,
            thresholds=compared.thresholds,
        )
        if compared.ks
        else None
    ),
}
"""Table name -> metric, which returns None if it was not requested."""


def evaluate(compared: Compared) -> dict[str, Result]:
    """Compute every requested metric; return the results by their names in `METRICS`.

    Raises:
        ValueError: a metric refuses the data; see the functions that compute them.
    """
    results = {name: metric(compared) for name, metric in METRICS.items()}
    return {name: result for name, result in results.items() if result is not None}
