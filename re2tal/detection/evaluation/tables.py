"""Ground truth and predictions of all videos in two tables, checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from re2tal.detection.segments import Detections, LabelledSegments

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
        """The rows that an index `(M,)` or a mask `(N,)` picks."""
        return Table(
            segments=self.segments[rows], videos=self.videos[rows], labels=self.labels[rows]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """What is compared.

    Attributes:
        actual: the instances.
        found: the predictions by class, and in a class by falling score.
        numbers: of the videos, by name.
    """

    actual: Table
    found: Table
    numbers: Mapping[str, int]

    def groups(self) -> tuple[Ints, Ints]:
        """A number for the video and class of each prediction `(P,)` and each instance `(N,)`."""
        sides = (self.found, self.actual)
        found, actual = (side.labels * len(self.numbers) + side.videos for side in sides)
        return found, actual


def tabulate(
    truth: Mapping[str, LabelledSegments],
    predictions: Mapping[str, Detections],
    *,
    num_classes: int | None = None,
    exclude: Collection[str] = (),
) -> Tables:
    """Puts all videos in tables.

    Predictions of equal score keep their order; scores may be infinite.

    Args:
        truth: instances by video.
        predictions: by video.
        num_classes: C, if labels must be 0 to C - 1; otherwise labels are not looked at, and 0.
        exclude: videos to leave out of both.

    Raises:
        ValueError: If there is no ground truth, or a video's tensors do not fit together, a label
            is out of range, a segment is not finite or a score is not a number.
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
    by_score = np.argsort(-scores, kind="stable")
    by_class = by_score[np.argsort(found.labels[by_score], kind="stable")]
    return Tables(actual=actual, found=found[by_class], numbers=numbers)


def tabulate_segments(
    parts: Mapping[str, Tensor], numbers: Mapping[str, int], *, what: str
) -> tuple[Floats, Ints]:
    """Segments `(N, 2)` of videos that have a number, and these `(N,)`; refuses infinite ones."""
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
    """All parts, one after the other, in float64: exact for any label or score there is."""
    if not parts:
        return np.zeros([max(size, 0) for size in shape])
    whole = torch.cat([part.cpu() for part in parts])
    return whole.detach().double().reshape(shape).numpy()


def _refuse(
    bad: Bools, videos: Ints, numbers: Mapping[str, int], subject: str, complaint: str
) -> None:
    """Complains about the first bad row, with the name of its video."""
    if bad.any():
        number = videos[bad.argmax()]
        name = next(name for name, of_video in numbers.items() if of_video == number)
        raise ValueError(f"{subject} of video {name!r} have {complaint}.")
