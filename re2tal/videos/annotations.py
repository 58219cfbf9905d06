"""What happens when in which video: ActivityNet-style JSON, read and checked whole.

ActivityNet-1.3, THUMOS-14, HACS and FineAction all come as
`{"database": {id: {"subset", "duration", "annotations": [{"segment": [s, e], "label"}]}}}`.
Other keys ("taxonomy", "version", "url", ...) may be there and are not read.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError

# Seconds that a segment may reach past the duration: durations are rounded, and containers and
# streams disagree by as much. Such a segment is clipped; what reaches further is an error.
DURATION_TOLERANCE = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """One action: its `label`, from second `start` to second `end` of its video."""

    start: float
    end: float
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoAnnotation:
    """One video: its `duration` in seconds and its instances by start; there may be none."""

    video_id: str
    subset: str
    duration: float
    instances: tuple[Instance, ...] = ()


class AnnotationError(ValueError):
    """Annotations that cannot be used.

    Attributes:
        source: The file.
        problems: Every problem found in it, each naming the video and the reason.
    """

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__(source, self.problems)  # these args let the error travel between processes

    def __str__(self) -> str:
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        heading = f"{self.source}: {count}. Correct or remove what is listed here, then run again."
        return "\n  - ".join((heading, *self.problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotations:
    """A collection of annotated videos.

    Attributes:
        classes: Every label, sorted: the index in this tuple is the class number.
        videos: The videos, sorted by id.
    """

    classes: tuple[str, ...]
    videos: tuple[VideoAnnotation, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that is used: it ignores order, layout and keys not read."""
        videos = sorted(
            [
                v.video_id,
                v.subset,
                v.duration,
                sorted([i.start, i.end, i.label] for i in v.instances),
            ]
            for v in self.videos
        )
        content = json.dumps([sorted(self.classes), videos], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def subset(self, name: str) -> "Annotations":
        """The videos of one subset, with the classes of the whole.

        Args:
            name: The subset, as the file calls it ("training", "validation", ...).

        Raises:
            AnnotationError: No video is in that subset; the message lists those that exist.
        """
        videos = tuple(video for video in self.videos if video.subset == name)
        if not videos:
            there = ", ".join(repr(s) for s in sorted({v.subset for v in self.videos})) or "none"
            raise AnnotationError(
                "annotations", [f"no video is in the subset {name!r}; subsets there are: {there}"]
            )
        return Annotations(classes=self.classes, videos=videos)


def load_annotations(path: str | Path, *, classes: Sequence[str] | None = None) -> Annotations:
    """Reads an ActivityNet-style JSON file and checks all of it before any of it is used.

    Numbers may be written as strings, as some THUMOS-14 files do. A segment that reaches past the
    duration by at most `DURATION_TOLERANCE` seconds is clipped to it.

    Args:
        path: The JSON file.
        classes: The labels that are allowed; by default those that the file uses.

    Returns:
        The annotations of all subsets.

    Raises:
        AnnotationError: The file cannot be read, or anything in it is wrong. It lists everything.
    """
    source = str(path)
    database, problems = _read(Path(path), source)
    allowed = None if classes is None else frozenset(classes)
    videos = []
    for video_id, raw in database.items():
        video, found = _check_video(video_id, raw, allowed)
        videos.append(video)
        problems += [f"video {video_id!r}: {reason}" for reason in found]
    labels = {i.label for video in videos if video for i in video.instances}
    if not problems and not (allowed or labels):
        problems.append("there is nothing to learn: no video has an annotated instance")
    if problems:
        raise AnnotationError(source, problems)
    return Annotations(
        classes=tuple(sorted(labels if allowed is None else allowed)),
        videos=tuple(sorted((v for v in videos if v), key=lambda video: video.video_id)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Context:
    """What an entry is checked against; None where it is not known."""

    duration: float | None
    classes: frozenset[str] | None


def _check_number(value: Any) -> Any:
    """Lets pydantic read numbers and numeric strings, but not true and false, as numbers."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "must be a number")
    return value


def _check_segment(segment: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
    """Refuses what is no stretch of the video, and clips what ends a little past the duration."""
    start, end = segment
    assert isinstance(info.context, _Context)
    duration = info.context.duration or float("inf")
    reason = None
    if start < 0:
        reason = "starts before the video does"
    elif end == start:
        reason = "has no length"
    elif end < start:
        reason = "is reversed: it ends before it starts"
    elif start >= duration or end > duration + DURATION_TOLERANCE:
        reason = f"reaches past the video's duration of {duration:g} s"
    if reason:
        raise PydanticCustomError("segment", reason)
    return start, min(end, duration)


def _check_label(label: str, info: ValidationInfo) -> str:
    """Refuses a label that is not among the classes."""
    assert isinstance(info.context, _Context)
    if info.context.classes is not None and label not in info.context.classes:
        raise PydanticCustomError("label", "is not a known class")
    return label


_Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_check_number)]
_Name = Annotated[str, Field(min_length=1)]


class _Action(BaseModel):
    """One entry of "annotations" as the file has it; needs a `_Context`."""

    segment: Annotated[tuple[_Number, _Number], AfterValidator(_check_segment)]
    label: Annotated[_Name, AfterValidator(_check_label)]


class _Video(BaseModel):
    """One value of "database" as the file has it; its actions are checked one by one."""

    subset: _Name
    duration: _Number = Field(gt=0)
    annotations: list[Any] = []


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys were given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        keys = [key for key, _ in pairs] if len(self) < len(pairs) else []
        self.repeated = sorted({key for key in keys if keys.count(key) > 1})


def _read(path: Path, source: str) -> tuple[dict[str, Any], list[str]]:
    """The file's "database", and the keys in it that are given twice as problems."""
    try:
        document = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_Object)
    except FileNotFoundError as error:
        raise AnnotationError(source, ["there is no such file"]) from error
    except OSError as error:
        raise AnnotationError(source, [f"cannot be read: {error.strerror}"]) from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(source, [f"is not a JSON text: {error}"]) from error
    database = document.get("database") if isinstance(document, _Object) else None
    if not isinstance(database, _Object):
        shape = 'the top level must be an object that holds the object "database" (id -> video)'
        raise AnnotationError(source, [shape])
    if not database:
        raise AnnotationError(source, ['"database" is empty'])
    return database, [f"video {key!r}: is there more than once" for key in database.repeated]


def _check_video(
    video_id: str, raw: Any, classes: frozenset[str] | None
) -> tuple[VideoAnnotation | None, list[str]]:
    """One typed video, or None and what is wrong with it."""
    problems = list(_id_problems(video_id))
    if isinstance(raw, _Object):
        problems += [f"key {key!r} is there more than once" for key in raw.repeated]
    subset, duration = "", None
    actions = raw.get("annotations") if isinstance(raw, _Object) else None
    try:
        video = _Video.model_validate(raw)
        subset, duration = video.subset, video.duration
    except ValidationError as error:
        problems += [_reason(**details) for details in error.errors()]
    context = _Context(duration=duration, classes=classes)
    instances = []
    # the actions of a video that is wrong itself are checked too: every problem is to be listed
    for number, action in enumerate(actions if isinstance(actions, list) else ()):
        try:
            checked = _Action.model_validate(action, context=context)
        except ValidationError as error:
            place = f"annotations[{number}]"
            problems += [_reason(place, **details) for details in error.errors()]
        else:
            start, end = checked.segment
            instances.append(Instance(start=start, end=end, label=checked.label))
    if problems or duration is None:
        return None, problems
    instances.sort(key=lambda i: (i.start, i.end, i.label))
    video_annotation = VideoAnnotation(
        video_id=video_id, subset=subset, duration=duration, instances=tuple(instances)
    )
    return video_annotation, problems


def _reason(place: str = "", /, *, loc: tuple[int | str, ...], **details: Any) -> str:
    """One pydantic error as a phrase: `annotations[3].segment: has no length (found [2, 2])`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc]
    place = "".join((place, *parts)).removeprefix(".") or "the entry"
    if details["type"] == "missing":
        return f"{place}: is missing"
    message = "must be an object" if details["type"] == "model_type" else details["msg"]
    return f"{place}: {message[0].lower()}{message[1:]} (found {details['input']!r:.60})"


def _id_problems(video_id: str) -> Iterator[str]:
    """What keeps an id from being the plain name of a file in the video folder, if anything."""
    if not video_id or video_id in {".", ".."}:
        yield "the id does not name a file"
    elif any(character in "/\\" for character in video_id):
        yield "the id holds a path separator and could point outside the video folder"
    elif any(unicodedata.category(character) in {"Cc", "Cs"} for character in video_id):
        yield "the id holds a control character, which no file name should"
