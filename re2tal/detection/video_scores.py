"""External video-level classification: the usual protocol on ActivityNet, HACS and FineAction.

A detector with one class proposes segments, and a classifier of whole videos supplies classes. Each
proposal gets the classes with the video's highest scores; the score of a detection is the product
of the proposal's score and the class's. ActionFormer's code and OpenTAD's class for FineAction take
the square root of the product, OpenTAD's class for ActivityNet does not, and its class for HACS
doubles the product. None of this changes the order of detections, so no metric changes.

The files of this protocol are JSON: `{"results": {video id: [K numbers]}, "class": [K names]}`.

- ActivityNet, CUHK's classifier (`cuhk_val_simp_share.json`, `cuhk_val_simp_7.json`): plain scores.
  ActionFormer's code ignores "class" and relies on the order; here classes are matched by name.
- HACS, TCANet's classifier (`validation94.32.json`): logits, nested in a list of one list per
  video; they need a softmax.
- FineAction: the key of the names may be "classes".

Video ids may or may not have the prefix "v_" of ActivityNet's file names. THUMOS-14's scores
(UntrimmedNet) are a table without names: make a `VideoScores` from its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, ValidationError
from torch import Tensor

from re2tal.annotations import normal_form
from re2tal.detection.files import read_json
from re2tal.detection.segments import Detections
from re2tal.errors import shortened
from re2tal.json_files import FileError, problem_of

_PREFIX = "v_"


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoScores:
    """Scores of a classifier for whole videos.

    Attributes:
        classes: K class names.
        scores: video id, with or without "v_" -> `(K,)` scores, finite and not negative.

    Raises:
        ValueError: the scores of videos have another shape, are negative or not finite; the message
            lists these videos.
    """

    classes: tuple[str, ...]
    scores: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        shape = (len(self.classes),)
        wrong = [
            f"{video_id!r}"
            for video_id, of_video in self.scores.items()
            if of_video.shape != shape or not _usable(of_video)
        ]
        if wrong:
            raise ValueError(
                f"Each video needs {len(self.classes)} scores, one per class, finite and not "
                f"negative; this is not so for {', '.join(shortened(wrong, 10))}."
            )

    def get(self, video_id: str) -> Tensor | None:
        """Return the scores `(K,)` of a video, ignoring the prefix "v_"; None if unknown."""
        for known in (video_id, normal_form(video_id)):
            for name in (known, _PREFIX + known, known.removeprefix(_PREFIX)):
                if name in self.scores:
                    return self.scores[name]
        return None


def load_video_scores(
    path: str | Path, classes: Sequence[str], *, logits: bool = False
) -> VideoScores:
    """Read a file of video-level scores and check all of it.

    Args:
        path: JSON file (format: module docstring).
        classes: K class names, indexed by the labels; the file may have more.
        logits: true for a file of logits; scores are their softmax over all classes of the file.

    Returns:
        Scores of all videos of the file, float32, in the order of `classes`.

    Raises:
        FileError: the file cannot be read, or its content is wrong: a class is missing or repeated,
            a video has a wrong number of scores, or a score is negative or not finite. The message
            lists all problems.
    """
    document, problems = read_json(path)
    try:
        content = _File.model_validate(document)
    except ValidationError as error:
        found = [*map(problem_of, error.errors())]
        raise FileError(str(path), [*problems, *found]) from error
    names = content.classes
    problems += [f"class {name!r}: is missing" for name in classes if name not in names]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [f"class {name!r}: is there more than once" for name in twice]
    for video_id, values in content.results.items():
        if len(values) != len(names):
            problems.append(
                f"video {video_id!r}: has {len(values)} scores for {len(names)} classes"
            )
        elif not logits and min(values, default=0.0) < 0:
            problems.append(
                f"video {video_id!r}: has a negative score; if the file holds logits, say so "
                "(logits=True)"
            )
        elif max(map(abs, values), default=0.0) > torch.finfo(torch.float32).max:
            problems.append(f"video {video_id!r}: has a score beyond the range of float32")
    if problems:
        raise FileError(str(path), problems)
    columns = [names.index(name) for name in classes]
    scores = {}
    for video_id, values in content.results.items():
        row = torch.tensor(values, dtype=torch.float64)  # all classes of the file, for the softmax
        scores[normal_form(video_id)] = (row.softmax(dim=0) if logits else row)[columns].float()
    return VideoScores(classes=tuple(classes), scores=scores)


def fuse(proposals: Detections, scores: Tensor, *, top: int) -> Detections:
    """Give the proposals of one video the video's best classes.

    Args:
        proposals: N detections; their labels are ignored.
        scores: `(K,)` scores of the video's classes, finite and not negative.
        top: number of classes for each proposal (2 on ActivityNet and FineAction, 3 on HACS).

    Returns:
        `N * top` detections by falling score, which is the product of the proposal's score and the
        class's. Ties: the better class first, then the earlier proposal.

    Raises:
        ValueError: there are fewer classes than `top`, or a score is not finite or negative.
    """
    if not 1 <= top <= len(scores):
        raise ValueError(f"Proposals can be given 1 to {len(scores)} classes each, not {top}.")
    if not _usable(scores):
        raise ValueError(
            f"The video-level scores {scores.tolist()} cannot be fused: they must be finite and "
            "not negative (probabilities, not logits)."
        )
    best = scores.to(proposals.scores).sort(descending=True, stable=True)
    count = len(proposals)
    # Class by class, so that the final stable sort puts the better class first on ties.
    return Detections(
        segments=proposals.segments.repeat(top, 1),
        scores=(best.values[:top, None] * proposals.scores).flatten(),
        labels=best.indices[:top].repeat_interleave(count),
    ).sorted()


def fuse_videos(
    proposals: Mapping[str, Detections], scores: VideoScores, *, top: int
) -> dict[str, Detections]:
    """Give the proposals of many videos each video's best classes.

    Args:
        proposals: video id -> proposals, usually after class-agnostic NMS.
        scores: scores of at least these videos.
        top: number of classes for each proposal.

    Returns:
        Video id -> result of `fuse`.

    Raises:
        ValueError: videos have no scores; the message lists them.
    """
    of_video = {video_id: scores.get(video_id) for video_id in proposals}
    missing = [video_id for video_id, found in of_video.items() if found is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(proposals)} videos have no video-level scores: "
            f"{', '.join(shortened(missing, 10))}. Leave them out of the proposals, or use the "
            "scores of their subset."
        )
    return {
        video_id: fuse(proposals[video_id], found, top=top)
        for video_id, found in of_video.items()
        if found is not None
    }


def _usable(scores: Tensor) -> bool:
    return bool((scores.isfinite() & (scores >= 0)).all())


def _unwrapped(value: Any) -> Any:
    """Unwrap a list that is nested in a list of length 1."""
    return (
        value[0]
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list)
        else value
    )


_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _File(BaseModel):
    results: dict[str, Annotated[list[_Number], BeforeValidator(_unwrapped)]]
    classes: list[str] = Field(validation_alias=AliasChoices("class", "classes"))
