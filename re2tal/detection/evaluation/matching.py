"""Checked tables of the ground truth and predictions of all videos, and their matching."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from re2tal.detection.segments import Detections, LabelledSegments, tiou

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Segments of all videos.

    Attributes:
        segments: `(N, 2)` starts and ends.
        videos: `(N,)` numbers of the videos.
        labels: `(N,)` class indices.
    """

    segments: Floats
    videos: Ints
    labels: Ints

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Ints | Bools) -> Table:
        """Select rows by an index `(M,)` or a mask `(N,)`."""
        return Table(
            segments=self.segments[rows], videos=self.videos[rows], labels=self.labels[rows]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """Instances and predictions to compare.

    Attributes:
        actual: instances.
        found: predictions by class, and within a class by falling score.
        numbers: video id -> number of the video.
    """

    actual: Table
    found: Table
    numbers: Mapping[str, int]

    def groups(self) -> tuple[Ints, Ints]:
        """Number the (video, class) group of each prediction `(P,)` and each instance `(N,)`."""
        sides = (self.found, self.actual)
        found, actual = (side.labels * len(self.numbers) + side.videos for side in sides)
        return found, actual

    def pairs(self, levels: Floats, *, instants: float) -> Pairs:
        """Find the pairs of a group whose tIoU reaches the lowest level; see `overlapping`."""
        of_found, of_actual = self.groups()
        return overlapping(
            (self.found.segments, of_found),
            (self.actual.segments, of_actual),
            least=float(levels.min()),
            instants=instants,
        )


def tabulate(
    truth: Mapping[str, LabelledSegments],
    predictions: Mapping[str, Detections],
    *,
    num_classes: int | None = None,
    exclude: Collection[str] = (),
) -> Tables:
    """Put all videos in tables.

    Predictions of equal score keep their order; scores may be infinite.

    Args:
        truth: video id -> instances.
        predictions: video id -> predictions.
        num_classes: C, if labels must be 0 to C - 1; None to ignore labels, which become 0.
        exclude: ids of videos to leave out of both.

    Raises:
        ValueError: there is no ground truth, the sizes of a video's tensors differ, a label is out
            of range, a segment is not finite, or a score is NaN.
    """
    truth = {video: part for video, part in truth.items() if video not in exclude}
    predictions = {video: part for video, part in predictions.items() if video not in exclude}
    numbers = {name: number for number, name in enumerate(dict.fromkeys((*truth, *predictions)))}
    actual = _table(truth, numbers, num_classes, what="ground truth")
    if len(actual) == 0:
        raise ValueError(
            f"There is no ground truth in any of the {len(truth)} videos, so there is nothing to "
            "evaluate against: check the subset, the class names and the videos left out."
        )
    found = _table(predictions, numbers, num_classes, what="predictions")
    scores = _column([part.scores for part in predictions.values()], shape=(-1,))
    _refuse(
        np.isnan(scores), found.videos, numbers, "The predictions", "a score that is not a number"
    )
    # Two stable sorts: by class, within a class by score, within equal scores as given.
    by_score = np.argsort(-scores, kind="stable")
    by_class = by_score[np.argsort(found.labels[by_score], kind="stable")]
    return Tables(actual=actual, found=found[by_class], numbers=numbers)


def tabulate_segments(
    parts: Mapping[str, Tensor], numbers: Mapping[str, int], *, what: str
) -> tuple[Floats, Ints]:
    """Concatenate the segments of videos; refuse segments that are not finite.

    Returns:
        Segments `(N, 2)`, and the numbers of their videos `(N,)`.
    """
    counts = [part.shape[0] for part in parts.values()]
    videos = np.array([numbers[name] for name in parts], dtype=np.int64).repeat(counts)
    segments = _column(list(parts.values()), shape=(-1, 2))
    finite = np.isfinite(segments[:, 0]) & np.isfinite(segments[:, 1])
    _refuse(~finite, videos, numbers, f"The {what}", "a segment that is not finite")
    return segments, videos


def _table(
    parts: Mapping[str, LabelledSegments],
    numbers: Mapping[str, int],
    num_classes: int | None,
    what: str,
) -> Table:
    for name, part in parts.items():
        sizes = part.segments.shape[0], part.labels.shape[0]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The {what} of video {name!r} have {sizes[0]} segments but {sizes[1]} labels."
            )
    segments, videos = tabulate_segments(
        {name: part.segments for name, part in parts.items()}, numbers, what=what
    )
    labels = np.zeros(len(videos), dtype=np.int64)
    if num_classes is not None:
        labels = _column([part.labels for part in parts.values()], shape=(-1,)).astype(np.int64)
        unknown = (labels < 0) | (labels >= num_classes)
        _refuse(unknown, videos, numbers, f"The {what}", f"labels outside 0 to {num_classes - 1}")
    return Table(segments=segments, videos=videos, labels=labels)


def _column(parts: Sequence[Tensor], shape: tuple[int, ...]) -> Floats:
    """Concatenate all parts in float64, which represents any label or score exactly."""
    if not parts:
        return np.zeros([max(size, 0) for size in shape])
    whole = torch.cat([part.cpu() for part in parts])
    return whole.detach().double().reshape(shape).numpy()


def _refuse(
    bad: Bools, videos: Ints, numbers: Mapping[str, int], subject: str, complaint: str
) -> None:
    """Raise an error about the first bad row, with the name of its video."""
    if bad.any():
        number = videos[bad.argmax()]
        name = next(name for name, of_video in numbers.items() if of_video == number)
        raise ValueError(f"{subject} of video {name!r} have {complaint}.")


# Number of pairs whose overlaps are computed at once, so that their arrays stay in the cache.
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Overlapping predictions and instances, ordered by prediction and then by instance.

    Attributes:
        found: `(M,)` predictions, as rows of their table.
        actual: `(M,)` instances, as rows of their table.
        overlap: `(M,)` tIoU.
    """

    found: Ints
    actual: Ints
    overlap: Floats


def overlapping(
    found: tuple[Floats, Ints], actual: tuple[Floats, Ints], *, least: float, instants: float
) -> Pairs:
    """Find all pairs of a prediction and an instance of its group with a tIoU of at least `least`.

    Args:
        found: segments `(P, 2)` of the predictions and their groups `(P,)`.
        actual: segments `(N, 2)` and groups `(N,)` of the instances.
        least: smallest tIoU of a pair, above 0.
        instants: overlap of two segments of zero length, wherever they are. The official evaluators
            divide 0 by 0 there, and their results differ.
    """
    segments, groups = actual
    by_group = np.argsort(groups, kind="stable")
    first = np.searchsorted(groups[by_group], found[1], side="left")
    counts = np.searchsorted(groups[by_group], found[1], side="right") - first
    after = np.cumsum(counts)  # pairs up to and including each prediction
    total = int(after[-1]) if len(after) else 0
    cuts = np.searchsorted(after, np.arange(_CHUNK, total, _CHUNK))  # every _CHUNK pairs or so
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for rows in np.split(np.arange(len(counts)), cuts):
        guess = rows.repeat(counts[rows])
        # Number of each pair over all chunks; `.sum()` is 0 when there are no predictions.
        position = np.arange(len(guess)) + (after[rows[:1]] - counts[rows[:1]]).sum()
        # The number within its prediction selects one instance of the group after another.
        instance = by_group[first[guess] + position - (after - counts)[guess]]
        overlap = _overlap(found[0][guess], segments[instance], instants)
        enough = overlap >= least  # keep only these: most pairs of a group do not overlap
        parts.append((guess[enough], instance[enough], overlap[enough]))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Pairs(found=columns[0], actual=columns[1], overlap=columns[2])


def match(pairs: Pairs, *, num_found: int, num_actual: int, levels: Floats) -> list[Ints]:
    """Match predictions to instances one to one, in the order of the predictions.

    Each prediction takes the free instance of greatest overlap (on ties the first), if the overlap
    reaches the level. A loop over predictions would be slow. Instead, a prediction is matched as
    soon as no earlier prediction has a pair left with its favourite instance. Each round matches
    all such predictions at once and removes their pairs. There are at most as many rounds as a
    group has instances, usually two or three.

    Args:
        pairs: all pairs whose overlap reaches the lowest level.
        num_found: P.
        num_actual: N.
        levels: `(K,)` tIoU thresholds.

    Returns:
        For each level, the rows of `pairs` that were matched.
    """
    # By prediction, and within a prediction by falling overlap; lexsort is stable.
    by_preference = np.lexsort((-pairs.overlap, pairs.found))
    overlap = pairs.overlap[by_preference]
    taken = []
    for level in levels:
        waiting = by_preference[overlap >= level]
        served_pairs = [waiting[:0]]  # `concatenate` needs at least one part
        unserved, free = np.ones(num_found, dtype=bool), np.ones(num_actual, dtype=bool)
        while len(waiting):
            guess, instance = pairs.found[waiting], pairs.actual[waiting]
            favourite = np.r_[True, guess[1:] != guess[:-1]]  # first pair of each prediction
            next_in_line = np.full(num_actual, num_found)
            np.minimum.at(next_in_line, instance, guess)  # first prediction of each instance
            served = favourite & (next_in_line[instance] == guess)
            served_pairs.append(waiting[served])
            unserved[guess[served]] = False
            free[instance[served]] = False
            waiting = waiting[unserved[guess] & free[instance]]
        taken.append(np.concatenate(served_pairs))
    return taken


def first_ranks(pairs: Pairs, groups: Ints, *, num_actual: int, levels: Floats) -> Ints:
    """Find the rank, in its group, of the first prediction that covers each instance.

    Args:
        pairs: all pairs whose overlap reaches the lowest level.
        groups: `(P,)` groups of the predictions.
        num_actual: N.
        levels: `(K,)` tIoU thresholds.

    Returns:
        `(K, N)` ranks from 0; the largest int64, beyond any budget, for instances not covered.
    """
    order = np.argsort(groups, kind="stable")  # stable: within a group by falling score
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - np.searchsorted(groups[order], groups[order])
    first = np.full((len(levels), num_actual), np.iinfo(np.int64).max)
    for level, of_level in zip(levels, first, strict=True):
        enough = pairs.overlap >= level
        np.minimum.at(of_level, pairs.actual[enough], ranks[pairs.found[enough]])
    return first


def checked_levels(thresholds: object) -> Floats:
    """Return thresholds `(K,)` in float64; raise ValueError if none or one outside (0, 1]."""
    levels = np.asarray(thresholds, dtype=np.float64)
    if levels.ndim != 1 or levels.size == 0 or not bool(((levels > 0) & (levels <= 1)).all()):
        raise ValueError(f"Thresholds must lie in (0, 1], but are {thresholds}.")
    return levels


def _overlap(found: Floats, actual: Floats, instants: float) -> Floats:
    overlap = tiou(torch.from_numpy(found), torch.from_numpy(actual)).numpy()
    both = (found[:, 1] <= found[:, 0]) & (actual[:, 1] <= actual[:, 0])
    return np.where(both, instants, overlap)
