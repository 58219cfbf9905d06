"""Average recall of proposals against their average number, as ActivityNet's evaluator counts it.

Every video keeps the same percentage of its proposals, those with the highest scores, chosen so
that a video has AN proposals on average: videos with many proposals contribute more. AR@AN is the
part of all instances that one of their video's kept proposals overlaps by at least tIoU, averaged
over the thresholds. AUC is the area under AR over AN, divided by the largest AN, in percent. Since
the curve starts at AN = 1, perfect proposals reach 99 for the usual AN of 1 to 100.

Labels do not matter, a proposal may find several instances, segments without length find nothing,
and videos without ground truth are no videos. What the official code does beyond that description,
and so do we:

- first every video's proposals are cut to the percentage for the largest AN, then to those for
  each AN, of what is left. Both numbers are cut to integers after products in float64 that may
  fall just short of one: 29 % of 100 proposals are 28;
- proposals in videos without ground truth count in the first percentage, not in the second;
- a video with fewer proposals than its share keeps all, and no other gets the rest. So with fewer
  proposals than the largest AN, the curve is flat from their number on.

Two things are our own: proposals of equal score keep their order, and no proposals at all score 0
where the official code divides by it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from re2tal.detection.evaluation.matching import checked_levels, first_ranks, overlapping
from re2tal.detection.evaluation.tables import Floats, Ints, tabulate
from re2tal.detection.segments import Detections, LabelledSegments

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
