"""Detections as ActivityNet's results JSON, which its evaluation server and most tools take.

`{"version": ..., "external_data": {}, "results": {video id: [{"segment": [s, e], "score": p,
"label": class name}, ...]}}`, in seconds. Of other people's files only "results" is read.
Numbers are written with nine significant digits, which is what float32 needs to come back
unchanged: a file says exactly what was detected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from re2tal.detection.atomic import replacing
from re2tal.detection.segments import Detections

_VERSION = "re2tal"
_SHOWN = 100  # a file of another data set has a problem in each of a million rows


class DetectionFileError(ValueError):
    """A file of detections, or of what belongs to them, that cannot be used.

    Attributes:
        source: The file.
        problems: Every problem found in it, each naming the place and the reason.
    """

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__(source, self.problems)  # these args let the error travel between processes

    def __str__(self) -> str:
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        shown = list(self.problems[:_SHOWN])
        if len(self.problems) > _SHOWN:
            shown.append(f"... and {len(self.problems) - _SHOWN} more")
        return "\n  - ".join((f"{self.source}: {count}.", *shown))


def rows(detections: Detections, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Detections as the rows of the JSON file.

    Args:
        detections: of one video, in seconds, on any device.
        classes: class names, which the labels index.

    Returns:
        `{"segment": [start, end], "score": score, "label": class name}` for each, in order.

    Raises:
        ValueError: If a label has no name, or a number is not finite.
    """
    labels = detections.labels.tolist()
    unnamed = sorted({label for label in labels if not 0 <= label < len(classes)})
    if unnamed:
        raise ValueError(
            f"Detections have the labels {unnamed}, but there are {len(classes)} classes: labels "
            f"must be 0 to {len(classes) - 1}."
        )
    finite = detections.segments.isfinite().all() & detections.scores.isfinite().all()
    if not bool(finite):
        raise ValueError("Detections have a segment or a score that is not finite.")
    return [
        {"segment": [_digits(x) for x in segment], "score": _digits(score), "label": classes[label]}
        for segment, score, label in zip(
            detections.segments.tolist(), detections.scores.tolist(), labels, strict=True
        )
    ]


def write_detections(
    path: str | Path, detections: Mapping[str, Detections], classes: Sequence[str]
) -> None:
    """Writes the detections of videos, sorted by id.

    Args:
        path: the JSON file; it is replaced when the new one is whole.
        detections: by video, in seconds.
        classes: class names, which the labels index.

    Raises:
        ValueError: If detections cannot be written (see `rows`), naming the video.
    """
    results = {}
    for video_id, found in sorted(detections.items()):
        try:
            results[video_id] = rows(found, classes)
        except ValueError as error:
            raise ValueError(f"Video {video_id!r} cannot be written to {path}: {error}") from error
    document = {"version": _VERSION, "external_data": {}, "results": results}
    with replacing(path) as partial:
        partial.write_text(json.dumps(document), encoding="utf-8")


def read_detections(path: str | Path, classes: Sequence[str]) -> dict[str, Detections]:
    """Reads detections and checks all of them before any is used.

    Args:
        path: the JSON file.
        classes: class names; the labels of the result index them.

    Returns:
        Video id to detections in seconds, float32, in the order of the file.

    Raises:
        DetectionFileError: If the file cannot be read or anything in it is wrong: a label that is
            no class, a number that is none, a reversed segment, a missing key, a video that is
            there twice. It lists everything.
    """
    document, repeated = read_json(path)
    problems = [f"key {key!r}: is there more than once" for key in repeated]
    if not isinstance(document, dict) or "results" not in document:
        shape = 'the top level must be an object with the key "results" (video id -> detections)'
        raise DetectionFileError(str(path), [*problems, shape])
    index = {name: i for i, name in enumerate(classes)}
    try:
        results = _RESULTS.validate_python(document["results"], context=index)
    except ValidationError as error:
        found = (_reason(details) for details in error.errors(include_url=False))
        raise DetectionFileError(str(path), [*problems, *found]) from error
    if problems:
        raise DetectionFileError(str(path), problems)
    return {
        video_id: Detections(
            segments=torch.tensor([row.segment for row in found]).reshape(-1, 2),
            scores=torch.tensor([row.score for row in found]),
            labels=torch.tensor([index[row.label] for row in found], dtype=torch.int64),
        )
        for video_id, found in results.items()
    }


def read_json(path: str | Path) -> tuple[Any, list[str]]:
    """A JSON file, and the keys that one of its objects has more than once.

    Raises:
        DetectionFileError: If there is no such file, or it is no JSON.
    """
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return found

    try:
        text = Path(path).read_text("utf-8-sig")
        return json.loads(text, object_pairs_hook=unique), repeated
    except FileNotFoundError as error:
        raise DetectionFileError(str(path), ["there is no such file"]) from error
    except OSError as error:
        raise DetectionFileError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except (ValueError, RecursionError) as error:
        raise DetectionFileError(str(path), [f"is not a JSON text: {error}"]) from error


def _digits(number: float) -> float:
    return float(f"{number:.9g}")


def _in_order(segment: tuple[float, float]) -> tuple[float, float]:
    if segment[1] < segment[0]:
        raise PydanticCustomError("segment", "is reversed: it ends before it starts")
    return segment


def _known(label: str, info: ValidationInfo) -> str:
    assert info.context is not None  # read_detections gives the classes
    if label not in info.context:
        raise PydanticCustomError("label", "is not a known class")
    return label


_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Row(BaseModel):
    segment: Annotated[tuple[_Number, _Number], AfterValidator(_in_order)]
    score: _Number
    label: Annotated[str, Field(strict=True), AfterValidator(_known)]


_RESULTS = TypeAdapter(dict[str, list[_Row]])


def _reason(details: ErrorDetails) -> str:
    """One pydantic error as a phrase: `video 'x'[3].score: should be finite (found nan)`."""
    video, *place = details["loc"] or ("",)
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    where = f"video {video!r}" + "".join(parts) if details["loc"] else '"results"'
    if details["type"] == "missing":
        return f"{where}: is missing"
    message = "Must be an object" if details["type"] == "model_type" else details["msg"]
    return f"{where}: {message[0].lower()}{message[1:]} (found {details['input']!r:.60})"
