"""Mean average precision of detections, recall in its two usual forms, and a table of the three.

Each function states its definition. All three follow the code of the metric's benchmark, also in
details that its description leaves open. `METRICS` at the end is what training and `evaluate.py`
compute, log, print and write: a metric that is entered there is in all of them.
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
"""Row of a table: values by the names of their columns."""


def _row(head: Row, thresholds: Floats, values: Floats) -> Row:
    """Return a row of a mean, and a value for each threshold; None where there is none."""
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
        per_class: `(K, C)` average precision in [0, 1]; nan for classes without ground truth.
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
            names: `C` different names of the classes.
        """
        metrics = {"mAP": self.average}
        for threshold, value in zip(self.thresholds, self.mAP, strict=True):
            metrics[f"mAP/tiou_{float(threshold):.2f}"] = float(value)
        for name, value in zip(names, self.per_class.mean(0), strict=True):
            if np.isfinite(value):  # a class without ground truth has no AP
                metrics[f"AP/{name}"] = float(value)
        return metrics

    def rows(self, classes: Sequence[str]) -> list[Row]:
        """Return a row (class, instances, average, one column a threshold) a class, then mAP's."""
        rows = [
            _row({"class": name, "instances": int(count)}, self.thresholds, values)
            for name, count, values in zip(classes, self.instances, self.per_class.T, strict=True)
        ]
        whole: Row = {"class": "mAP", "instances": int(self.instances.sum())}
        return [*rows, _row(whole, self.thresholds, self.mAP)]

    def lines(self) -> Iterator[str]:
        """Return no line: the rows are printed."""
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

    For one class and one tIoU threshold, the predictions of all videos are visited by falling
    score. Each one takes the ground truth of its video and class that it overlaps most among those
    not yet taken and overlapped by at least the threshold (so a prediction whose best ground truth
    is taken falls through to its next best, unlike in Pascal VOC); without any, it is a false
    positive. The average precision is the area under the interpolated precision-recall curve; the
    mean over the classes that have ground truth is the mAP.

    Details that the definition leaves open or hides, and their treatment here:

    - equal scores are visited in the order of `predictions` and of each video's detections (the
      official code's order is arbitrary); of ground truth overlapped equally the first is taken;
    - nothing is cut to a video's duration, and duplicates in the ground truth stay, each to be
      found;
    - predictions in videos without ground truth of their class, or unknown altogether, are false
      positives;
    - two zero-length segments of a class in one video match at every threshold, wherever they are,
      as the official code's 0/0 does (ActivityNet's validation set has three such instances).

    THUMOS-14 marks segments as ambiguous where the annotators could not tell if they are an action.
    Its own toolkit (TH14evalDet) ignores false positives that share any time at all with such a
    segment of their video, whatever the class; true positives stay, and missed ambiguous segments
    cost nothing. `ambiguous` does just that. Matching and averaging remain ActivityNet's, which is
    how the field evaluates THUMOS-14: that toolkit lets each instance pick the prediction that
    overlaps it most, whatever the score, and leaves the curve uninterpolated.

    Computed in float64. Reversed segments count as zero-length ones. Scores may be infinite.

    Args:
        truth: video id -> instances (maybe none), for every video of the evaluated subset. The unit
            of the segments must be that of the predictions, usually seconds.
        predictions: video id -> predictions; videos may be missing or unknown. Without any, the
            result is 0.
        num_classes: C; labels are 0 to C - 1.
        thresholds: K tIoU thresholds above 0.
        ambiguous: video id -> segments `(M, 2)` where false positives do not count.
        exclude: ids of videos that count neither in `truth` nor in `predictions`, say because their
            annotation is wrong; they need not occur there.

    Returns:
        Average precision per threshold and class.

    Raises:
        ValueError: there is no ground truth at all, a label is not in range, a score is not a
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
    return MapResult(
        thresholds=levels,
        per_class=per_class,
        instances=counts,
        mAP=means,
        average=float(means.mean()),
    )


def _touching(tables: Tables, ambiguous: Mapping[str, Tensor]) -> Ints:
    """Rows of predictions that share time with an ambiguous segment of their video."""
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

    It needs only the true positives and the number of predictions visited when each was found:
    between two of them recall stands still and precision falls.

    Args:
        hits: rows of the true positives, rising, in a table by class and falling score.
        ignored: rows that do not count unless they are `hits`, rising.
        starts: `(C + 1,)` first row of each class.
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

    def metrics(self, names: Sequence[str]) -> dict[str, float]:  # noqa: ARG002 - not by class
        """Return `recall_1x` (the average), `recall_1x/tiou_0.50`, ...: MLflow takes no "@"."""
        metrics = {}
        for k, of_k in zip(self.ks, self.recall.T, strict=True):
            metrics[f"recall_{k}x"] = float(of_k.mean())
            for threshold, value in zip(self.thresholds, of_k, strict=True):
                metrics[f"recall_{k}x/tiou_{float(threshold):.2f}"] = float(value)
        return metrics

    def rows(self, classes: Sequence[str]) -> list[Row]:
        """Return a row (k, class, average, one column a threshold) a k and class, and means."""
        return [
            _row({"k": k, "class": name}, self.thresholds, values)
            for place, k in enumerate(self.ks)
            for name, values in (
                *zip(classes, self.per_class[:, place].T, strict=True),
                ("mean", self.recall[:, place]),
            )
        ]

    def lines(self) -> Iterator[str]:
        """Return one line a k."""
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

    In a video with n instances of a class, the k n predictions of that class with the highest
    scores are looked at. An instance is found if one of them overlaps it by at least the threshold;
    one prediction may find several instances. A class's recall is the part of its instances, in all
    videos, that are found, and the mean over the classes that have instances is reported (Grauman
    et al., Ego4D, CVPR 2022, appendix on Moment Queries; the field reports k = 1 at tIoU 0.5).

    Unlike in average precision, segments without length find nothing here, and other videos' scores
    do not matter.

    Args:
        truth: video id -> instances (maybe none), in the unit of the predictions, for every video
            of the evaluated subset.
        predictions: video id -> predictions; videos may be missing or unknown.
        num_classes: C; labels are 0 to C - 1.
        ks: numbers of predictions per instance, each at least 1.
        thresholds: K tIoU thresholds above 0.
        exclude: ids of videos that do not count.

    Raises:
        ValueError: a case of `mean_average_precision`, or `ks` are not positive.
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
_SHOWN = (1, 5, 10, 100)  # numbers of proposals a video at which average recall is named


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposalRecall:
    """Recall of proposals by their average number.

    Attributes:
        thresholds: `(K,)` tIoU thresholds.
        recall: `(K, A)` share of the instances found with 1, 2, ..., A proposals a video.
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
        """Return `AR/<AN>`, average recall with AN proposals a video, and `AR_AUC` in percent."""
        shown = {f"AR/{n}": float(self.average_recall[n - 1]) for n in _SHOWN}
        return {**shown, "AR_AUC": self.auc}

    def rows(self, classes: Sequence[str]) -> list[Row]:  # noqa: ARG002 - not by class
        """Return a row (proposals, average, one column a threshold) a number of proposals."""
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
    """Average recall of proposals by their average number, as ActivityNet's evaluator has it.

    Every video keeps the same percentage of its proposals, those with the highest scores, chosen so
    that a video has AN proposals on average: videos with many proposals contribute more. AR@AN is
    the part of all instances that one of their video's kept proposals overlaps by at least tIoU,
    averaged over the thresholds. AUC is the area under AR over AN, divided by the largest AN, in
    percent. Since the curve starts at AN = 1, perfect proposals reach 99 for the usual AN of 1 to
    100.

    Labels do not matter, a proposal may find several instances, segments without length find
    nothing, and videos without ground truth are ignored. The official code, and this one, also
    follow rules that this description omits:

    - first every video's proposals are cut to the percentage for the largest AN, then to those for
      each AN, of what is left. Both numbers are cut to integers after products in float64 that may
      fall just short of one: 29 % of 100 proposals are 28;
    - proposals in videos without ground truth count in the first percentage, not in the second;
    - a video with fewer proposals than its share keeps all, and no other gets the rest. So with
      fewer proposals than the largest AN, the curve is flat from their number on.

    Two things are our own: proposals of equal score keep their order, and no proposals at all score
    0 where the official code divides by it.

    Args:
        truth: video id -> instances (maybe none), in the unit of the proposals, for every video of
            the evaluated subset.
        proposals: video id -> proposals; videos may be missing or unknown.
        max_average: A, the largest average number of proposals. All from 1 to A are evaluated;
            for A = 100 these are the 100 points of the official curve.
        thresholds: K tIoU thresholds above 0.
        exclude: ids of videos that do not count.

    Raises:
        ValueError: there is no ground truth, a segment is not finite, a score is not a number, or
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
    """Number of proposals that each video keeps at each average number.

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """Detections and the ground truth that they are compared with, in seconds.

    Attributes:
        truth: video id to instances, for every video of the evaluated subset.
        predictions: video id to detections.
        proposals: video id to the same before an external classifier named their classes; None
            where the recall of proposals is not asked for.
        num_classes: C; labels are 0 to C - 1.
        thresholds: K tIoU thresholds.
        ambiguous: video id to segments `(M, 2)` where false positives do not count.
        ks: each k of Recall@kx, none where the data set's benchmark does not report it.
    """

    truth: Mapping[str, LabelledSegments]
    predictions: Mapping[str, Detections]
    proposals: Mapping[str, Detections] | None
    num_classes: int
    thresholds: Sequence[float]
    ambiguous: Mapping[str, Tensor] | None
    ks: Sequence[int]


class Result(Protocol):
    """Numbers of one metric."""

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """Return the numbers to log by their names, in which classes bear the given names."""
        ...

    def rows(self, classes: Sequence[str]) -> list[Row]:
        """Return the rows of the table to write, which all have the same columns."""
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
"""Every metric by the name of its table; it returns None where it is not asked for."""


def evaluate(compared: Compared) -> dict[str, Result]:
    """Compute every metric that is asked for, by the names in `METRICS`.

    Raises:
        ValueError: a case of `mean_average_precision`, `average_recall` or `recall_at`.
    """
    results = {name: metric(compared) for name, metric in METRICS.items()}
    return {name: result for name, result in results.items() if result is not None}
