"""What is wrong with the false positives, and what mAP would gain without each kind of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from re2tal.detection.diagnosis.normalised import mean_average_precision
from re2tal.detection.diagnosis.outcomes import Bools, Floats, Ints, Outcomes, overlaps, padded

MIN_OVERLAP = 0.1
"""Below this tIoU with every instance, a false positive has nothing to do with any (DETAD)."""

GROUPS = 10
"""How many times as many predictions as instances are looked at (DETAD: the top 10G)."""

_CHUNK = 1 << 20  # overlaps computed at a time, so that memory stays in the tens of megabytes


class Kind(IntEnum):
    """What a prediction is, at a tIoU threshold t (the definitions of DETAD).

    A true positive has found an instance. Otherwise let o be the largest tIoU of the prediction
    with any instance of its video, whatever its class, and let that instance be the nearest one:

    - double detection: o >= t, and the nearest instance has the predicted class (a prediction of
      higher score has taken it);
    - wrong label: o >= t, and the nearest instance is of another class;
    - localization: 0.1 <= o < t, and the nearest instance has the predicted class;
    - confusion: 0.1 <= o < t, and the nearest instance is of another class;
    - background: o < 0.1.

    Of instances equally near, the first counts. (DETAD's published code judges predictions of a
    video without instances, all but the first, by the instances of another video; here they
    are all background.)
    """

    TRUE_POSITIVE = 0
    DOUBLE_DETECTION = 1
    WRONG_LABEL = 2
    LOCALIZATION = 3
    CONFUSION = 4
    BACKGROUND = 5


ERRORS = tuple(kind for kind in Kind if kind is not Kind.TRUE_POSITIVE)


@dataclass(frozen=True, kw_only=True, slots=True)
class FalsePositives:
    """The profile of the top predictions.

    Of a class with G_c instances, group i holds the predictions with ranks i G_c to
    (i + 1) G_c - 1: the top 1G, the next 1G and so on to 10G.

    Attributes:
        counts: `(K, 10, 6)` predictions of each threshold, group and kind.
        base: `(K,)` mAP_N of the top 10G predictions.
        gains: `(K, 5)` how much mAP_N rises when all top predictions of one kind of error are
            removed.
    """

    counts: Ints
    base: Floats
    gains: Floats

    @property
    def shares(self) -> Floats:
        """`(K, 10, 6)` of a group's predictions, the share of each kind; nan in empty groups."""
        total = self.counts.sum(axis=2, keepdims=True)
        return np.where(total > 0, self.counts / np.maximum(total, 1), np.nan)


def false_positives(outcomes: Outcomes) -> FalsePositives:
    """Profiles the top predictions of every class and removes one kind of error at a time."""
    groups = outcomes.ranks // outcomes.counts[outcomes.found.labels]
    top = groups < GROUPS
    kinds = classify(outcomes, top)
    counts = np.zeros((len(kinds), GROUPS, len(Kind)), dtype=np.int64)
    for level, of_level in enumerate(kinds):
        np.add.at(counts[level], (groups[top], of_level[top]), 1)
    hits = kinds == Kind.TRUE_POSITIVE
    false = top & ~hits
    hits &= top
    base = mean_average_precision(outcomes, hits, false)
    gains = [
        mean_average_precision(outcomes, hits, false & (kinds != kind)) - base for kind in ERRORS
    ]
    return FalsePositives(counts=counts, base=base, gains=np.stack(gains, axis=1))


def classify(outcomes: Outcomes, wanted: Bools) -> Ints:
    """The `Kind` of the `wanted` `(P,)` predictions at each threshold.

    Returns:
        `(K, P)`; of predictions that are not wanted, only whether they are true positives or
        not: these are called background.
    """
    kinds = np.full(outcomes.matched.shape, int(Kind.BACKGROUND), dtype=np.int64)
    rows = np.flatnonzero(wanted & (outcomes.matched < 0).any(axis=0))
    overlap, same = _nearest(outcomes, rows)
    levels = outcomes.thresholds[:, None]
    near = np.where(same, int(Kind.LOCALIZATION), int(Kind.CONFUSION))
    found = np.where(same, int(Kind.DOUBLE_DETECTION), int(Kind.WRONG_LABEL))
    below = np.where(overlap >= MIN_OVERLAP, near, int(Kind.BACKGROUND))
    kinds[:, rows] = np.where(overlap >= levels, found, below)
    kinds[outcomes.matched >= 0] = Kind.TRUE_POSITIVE
    return kinds


def _nearest(outcomes: Outcomes, rows: Ints) -> tuple[Floats, Bools]:
    """Largest tIoU of predictions with an instance, and whether that has their class: `(R,)`."""
    members = padded(outcomes.truth.videos, len(outcomes.videos))
    overlap = np.zeros(len(rows))
    same = np.zeros(len(rows), dtype=bool)
    step = max(1, _CHUNK // members.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        found = outcomes.found[rows[part]]
        nearby = members[found.videos]
        all_overlaps = overlaps(found.segments, outcomes.truth.segments[nearby])
        all_overlaps[nearby < 0] = -1.0
        best = all_overlaps.argmax(axis=1)[:, None]
        overlap[part] = np.take_along_axis(all_overlaps, best, axis=1)[:, 0]
        nearest = np.take_along_axis(nearby, best, axis=1)[:, 0]
        same[part] = outcomes.truth.labels[nearest] == found.labels
    return overlap, same
