"""Files in ActivityNet's results JSON, which its evaluation server and most tools accept.

`{"version": ..., "external_data": {}, "results": {video id: [{"segment": [s, e], "score": p,
"label": class name}, ...]}}`, in seconds. Only "results" is read. Numbers are written without
loss: float32 with nine significant digits, float64 with up to 17. They are read as float64: with
few decimals, a tIoU often lies exactly on a threshold, and in float32 it may fall on the other
side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
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
from pydantic_core import PydanticCustomError
from torch import Tensor

from re2tal import json_files
from re2tal.atomic import replacing
from re2tal.detection.segments import Detections
from re2tal.json_files import FileError, in_words, problem_of

_VERSION = "re2tal"


def rows(detections: Detections, classes: Sequence[str]) -> list[dict[str, Any]]:
    """List detections as the rows of the JSON file.

    Args:
        detections: detections of one video, in seconds, on any device.
        classes: class names, indexed by the labels.

    Returns:
        `{"segment": [start, end], "score": score, "label": class name}` for each, in order.

    Raises:
        ValueError: a label has no name, a number is not finite or a segment is reversed; the
            message names the first such row.
    """
    labels = detections.labels.tolist()
    unnamed = sorted({label for label in labels if not 0 <= label < len(classes)})
    if unnamed:
        raise ValueError(
            f"Detections have the labels {unnamed}, but there are {len(classes)} classes: labels "
            f"must be 0 to {len(classes) - 1}."
        )
    _check_numbers(detections)
    time, score_of = _writer(detections.segments), _writer(detections.scores)
    return [
        {"segment": [*map(time, segment)], "score": score_of(score), "label": classes[label]}
        for segment, score, label in zip(
            detections.segments.tolist(), detections.scores.tolist(), labels, strict=True
        )
    ]


def write_detections(
    path: str | Path, detections: Mapping[str, Detections], classes: Sequence[str]
) -> None:
    """Write the detections of videos, sorted by id.

    Args:
        path: JSON file; an existing one is replaced once the new one is complete.
        detections: video id -> detections in seconds.
        classes: class names, indexed by the labels.

    Raises:
        ValueError: detections cannot be written (see `rows`); the message names the video.
    """
    results = {}
    for video_id, found in sorted(detections.items()):
        try:
            results[video_id] = rows(found, classes)
        except ValueError as error:
            raise ValueError(f"Video {video_id!r} cannot be written to {path}: {error}") from error
    write_rows(path, results)


def write_rows(path: str | Path, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write detections that are rows already.

    Args:
        path: JSON file; an existing one is replaced once the new one is complete.
        results: video id -> result of `rows`.
    """
    document = {"version": _VERSION, "external_data": {}, "results": results}
    with replacing(path) as partial:
        partial.write_text(json.dumps(document), encoding="utf-8")


def read_detections(path: str | Path, classes: Sequence[str]) -> dict[str, Detections]:
    """Read detections and check all of them before any is used.

    Args:
        path: JSON file.
        classes: class names, indexed by the labels of the result.

    Returns:
        Video id -> detections in seconds, float64, in the order of the file.

    Raises:
        FileError: the file cannot be read, or its content is wrong: an unknown label, a value that
            is not a number, a reversed segment, a missing or repeated key (such as a video). The
            message lists all problems.
    """
    document, problems = read_json(path)
    if not isinstance(document, dict) or "results" not in document:
        shape = 'the top level must be an object with the key "results" (video id -> detections)'
        raise FileError(str(path), [*problems, shape])
    index = {name: i for i, name in enumerate(classes)}
    try:
        results = _RESULTS.validate_python(document["results"], context=index)
    except ValidationError as error:
        found = (problem_of(details, _place(*details["loc"])) for details in error.errors())
        raise FileError(str(path), [*problems, *found]) from error
    if problems:
        raise FileError(str(path), problems)
    return {
        video_id: Detections(
            segments=torch.tensor([row.segment for row in found], dtype=torch.float64).reshape(
                -1, 2
            ),
            scores=torch.tensor([row.score for row in found], dtype=torch.float64),
            labels=torch.tensor([index[row.label] for row in found], dtype=torch.int64),
        )
        for video_id, found in results.items()
    }


def read_json(path: str | Path) -> tuple[Any, list[str]]:
    """Read a JSON file; return its content and a message for each repeated key of an object.

    Raises:
        FileError: the file does not exist or is not JSON.
    """
    document, repeated = json_files.read_json(path)
    return document, [str(key) for key in repeated]


def _check_numbers(detections: Detections) -> None:
    """Refuse numbers that `read_detections` would refuse."""
    segments, scores = detections.segments, detections.scores
    infinite = ~(segments.isfinite().all(dim=1) & scores.isfinite())
    wrong = infinite | (segments[:, 1] < segments[:, 0])
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0])
    start, end = segments[row].tolist()
    reason = "is not finite" if bool(infinite[row]) else "is reversed: it ends before it starts"
    raise ValueError(
        f"Detection {row} {reason}: segment {start:g} to {end:g}, score {scores[row].item():g}. "
        f"{int(wrong.sum())} of {len(detections)} cannot be written."
    )


def _writer(numbers: Tensor) -> Callable[[float], float]:
    """Return a function that shortens a number to the digits that its precision needs."""
    if numbers.dtype == torch.float64:
        return float
    return lambda number: float(f"{number:.9g}")


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


def _place(*path: str | int) -> str:
    return f"video {path[0]!r}{in_words(path[1:])}" if path else '"results"'


Row = Mapping[str, Any]
"""`{"segment": [start, end], "score": score, "label": class name}`, a row made by `files.rows`."""


def webvtt(rows: Sequence[Row]) -> str:
    """Format detections as a WebVTT file with one cue for each.

    Cues may overlap: players stack them.

    Args:
        rows: detections of a video, in seconds.
    """
    cues = []
    for row in sorted(rows, key=lambda row: tuple(row["segment"])):
        start, end = _milliseconds(row)
        cues.append(f"{_clock(start, '.')} --> {_clock(end, '.')}\n{_escaped(_text(row))}\n")
    return "\n".join(["WEBVTT\n", *cues])


def srt(rows: Sequence[Row]) -> str:
    """Format detections as a SubRip file without overlapping cues, which many players cannot show.

    The video is cut wherever a detection starts or ends; each interval lists all its detections,
    best first.

    Args:
        rows: detections of a video, in seconds.
    """
    stretches = [
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n" + "\n".join(texts) + "\n"
        for number, (start, end, texts) in enumerate(_stretches(rows), start=1)
    ]
    return "\n".join(stretches)


def _stretches(rows: Sequence[Row]) -> list[tuple[int, int, list[str]]]:
    """List intervals: start and end in milliseconds, and the texts of all their detections."""
    best_first = sorted(rows, key=lambda row: -row["score"])
    timed = [(*_milliseconds(row), _plain(_text(row))) for row in best_first]
    cuts = sorted({time for start, end, _ in timed for time in (start, end)})
    found = []
    for first, last in pairwise(cuts):
        texts = [text for start, end, text in timed if start <= first and last <= end]
        if texts:
            found.append((first, last, texts))
    return found


def _milliseconds(row: Row) -> tuple[int, int]:
    """Round start and end to milliseconds; make a cue 1 ms long at least, or players refuse it."""
    start, end = (round(1000 * seconds) for seconds in row["segment"])
    return start, max(end, start + 1)


def _clock(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{rest:03d}"


def _text(row: Row) -> str:
    """Format label and score on one line: an empty line would end the cue."""
    return f"{' '.join(row['label'].split())} {row['score']:.2f}"


def _escaped(text: str) -> str:
    """Escape text for WebVTT, which uses HTML's entities."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _plain(text: str) -> str:
    """Replace angle brackets for SubRip, which has no entities: players read `<...>` as a tag."""
    return text.replace("<", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}").replace(
        ">", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
    )
