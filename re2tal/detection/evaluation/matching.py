"""Which prediction overlaps, finds or first covers which instance, for all videos at once.

Only pairs that overlap enough are ever kept: there are few of them, whatever the number of
predictions, so that neither time nor memory grows with the fullest video.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from re2tal.detection.evaluation.tables import Floats, Ints
from re2tal.detection.segments import tiou

# Pairs whose overlaps are computed together: their tables stay in the cache.
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Predictions with instances that they overlap, by prediction and then by instance.

    Attributes:
        found: `(M,)` predictions, as rows of their table.
        actual: `(M,)` instances, as rows of theirs.
        overlap: `(M,)` tIoU.
    """

    found: Ints
    actual: Ints
    overlap: Floats


def overlapping(
    found: tuple[Floats, Ints], actual: tuple[Floats, Ints], *, least: float, instants: float
) -> Pairs:
    """All pairs of one group that overlap by at least `least`.

    Args:
        found: segments `(P, 2)` of the predictions and the group `(P,)` that each belongs to.
        actual: segments `(N, 2)` and groups `(N,)` of the instances.
        least: the smallest overlap that counts, above 0.
        instants: what two segments without length overlap by, wherever they are. The official
            evaluators divide 0 by 0 there, and disagree on what that is.
    """
    segments, groups = actual
    by_group = np.argsort(groups, kind="stable")
    first = np.searchsorted(groups[by_group], found[1], side="left")
    counts = np.searchsorted(groups[by_group], found[1], side="right") - first
    after = np.cumsum(counts)
    total = int(after[-1]) if len(after) else 0
    cuts = np.searchsorted(after, np.arange(_CHUNK, total, _CHUNK))
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for rows in np.split(np.arange(len(counts)), cuts):
        guess = rows.repeat(counts[rows])
        position = np.arange(len(guess)) + (after[rows[:1]] - counts[rows[:1]]).sum()
        instance = by_group[first[guess] + position - (after - counts)[guess]]
        overlap = _overlap(found[0][guess], segments[instance], instants)
        enough = overlap >= least
        parts.append((guess[enough], instance[enough], overlap[enough]))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Pairs(found=columns[0], actual=columns[1], overlap=columns[2])


def match(pairs: Pairs, *, num_found: int, num_actual: int, levels: Floats) -> list[Ints]:
    """Gives each prediction an instance of its own, with predictions served in their order.

    Each prediction takes the free instance that it overlaps most (of equals the first), if the
    overlap reaches the level. Served one by one that would be a long loop. But a prediction can
    be served out of turn as soon as none before it still has a pair with its favourite: so all
    of these are served at once, their pairs struck out, and so on. That takes as many rounds as
    a group has instances at most, and mostly two or three.

    Args:
        pairs: with every overlap that reaches the lowest level.
        num_found: P.
        num_actual: N.
        levels: `(K,)` tIoU thresholds.

    Returns:
        For each level, which of the `pairs` were taken.
    """
    by_preference = np.lexsort((-pairs.overlap, pairs.found))
    overlap = pairs.overlap[by_preference]
    taken = []
    for level in levels:
        waiting = by_preference[overlap >= level]
        served_pairs = [waiting[:0]]
        unserved, free = np.ones(num_found, dtype=bool), np.ones(num_actual, dtype=bool)
        while len(waiting):
            guess, instance = pairs.found[waiting], pairs.actual[waiting]
            favourite = np.r_[True, guess[1:] != guess[:-1]]
            next_in_line = np.full(num_actual, num_found)
            np.minimum.at(next_in_line, instance, guess)
            served = favourite & (next_in_line[instance] == guess)
            served_pairs.append(waiting[served])
            unserved[guess[served]] = False
            free[instance[served]] = False
            waiting = waiting[unserved[guess] & free[instance]]
        taken.append(np.concatenate(served_pairs))
    return taken


def first_ranks(pairs: Pairs, groups: Ints, *, num_actual: int, levels: Floats) -> Ints:
    """How many predictions of its group come before the first that covers an instance.

    Args:
        pairs: with every overlap that reaches the lowest level.
        groups: `(P,)` of the predictions.
        num_actual: N.
        levels: `(K,)` tIoU thresholds.

    Returns:
        `(K, N)`; the largest int64, beyond any budget, where no prediction covers the instance.
    """
    order = np.argsort(groups, kind="stable")
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - np.searchsorted(groups[order], groups[order])
    first = np.full((len(levels), num_actual), np.iinfo(np.int64).max)
    for level, of_level in zip(levels, first, strict=True):
        enough = pairs.overlap >= level
        np.minimum.at(of_level, pairs.actual[enough], ranks[pairs.found[enough]])
    return first


def checked_levels(thresholds: object) -> Floats:
    """Thresholds `(K,)` in float64; a ValueError if they are none or not in (0, 1]."""
    levels = np.asarray(thresholds, dtype=np.float64)
    if levels.ndim != 1 or levels.size == 0 or not bool(((levels > 0) & (levels <= 1)).all()):
        raise ValueError(f"Thresholds must lie in (0, 1], but are {thresholds}.")
    return levels


def _overlap(found: Floats, actual: Floats, instants: float) -> Floats:
    overlap = tiou(torch.from_numpy(found), torch.from_numpy(actual)).numpy()
    both = (found[:, 1] <= found[:, 0]) & (actual[:, 1] <= actual[:, 0])
    return np.where(both, instants, overlap)
