"""Checks of entries: types, repairs according to the record, and comparison with video files."""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from re2tal.annotations import Annotations, Instance, Repair, VideoAnnotation
from re2tal.datasets.published import Dataset, Fault
from re2tal.json_files import in_words, problem_of

# Seconds by which a segment may end after the duration: durations are rounded, and those of
# container and stream differ by as much. Such a segment is clipped; a longer one is a fault.
DURATION_TOLERANCE = 1.0


# Possible durations in seconds: a typing error must not become a million windows.
LEAST_SECONDS, MOST_SECONDS = 1e-3, 1e7


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """Rules for checking the entries of a file.

    Attributes:
        dataset: record of the data set, whose known faults are repaired.
        classes: permitted labels; None permits all.
        durations: video id -> seconds, for entries without a duration of their own.
    """

    dataset: Dataset
    classes: frozenset[str] | None
    durations: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """Result for one entry; the video is None if there are problems."""

    video: VideoAnnotation | None
    repairs: tuple[Repair, ...] = ()
    problems: tuple[str, ...] = ()


def check_video(video_id: str, raw: Any, rules: Rules) -> Checked:
    """Return one typed video, or all of its problems."""
    problems = list(_id_problems(video_id))
    if isinstance(raw, dict) and raw.get("duration") is None:
        known = {"duration": rules.durations[video_id]} if video_id in rules.durations else {}
        raw = {key: value for key, value in raw.items() if key != "duration"} | known
    subset, duration = "", None
    try:
        entry = _Video.model_validate(raw)
        subset, duration = entry.subset, entry.duration
    except ValidationError as error:
        problems += _reasons(error)
    # actions are checked even if the video has problems, because all problems are listed
    actions = raw.get("annotations") if isinstance(raw, dict) else None
    instances: list[Instance] = []
    published: list[Instance] = []
    repairs: list[Repair] = []
    for number, action in enumerate(actions if isinstance(actions, list) else ()):
        found, written, changes, wrong = _check_action(
            video_id, _place(number, action), action, duration, rules
        )
        instances += [found] if found else []
        published += [written] if written else []
        repairs += changes
        problems += wrong
    if problems or duration is None:
        return Checked(video=None, problems=tuple(problems))
    # implied instances of published ones are as published, those of used ones as repaired
    added = [*_implied(video_id, published, rules)]
    instances += [repair.instance for repair in _implied(video_id, instances, rules)]
    published += [repair.instance for repair in added]
    instances, published = sorted(instances, key=_order), sorted(published, key=_order)
    ambiguous = rules.dataset.ambiguous
    used = tuple(i for i in instances if i.label not in ambiguous)
    as_written = tuple(i for i in published if i.label not in ambiguous)
    video = VideoAnnotation(
        video_id=video_id,
        subset=subset,
        duration=duration,
        instances=used,
        ambiguous=tuple(i for i in instances if i.label in ambiguous),
        published=None if as_written == used else as_written,
    )
    return Checked(video=video, repairs=(*repairs, *added))


def _check_number(value: Any) -> Any:
    """Refuse true and false, which pydantic would read as numbers, like numeric strings."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "must be a number")
    return value


Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_check_number)]
_Name = Annotated[str, Field(min_length=1)]


class _Action(BaseModel):
    """One entry of "annotations" as in the file."""

    segment: tuple[Number, Number]
    label: _Name


class _Video(BaseModel):
    """One value of "database" as in the file; its actions are checked one by one."""

    subset: _Name
    duration: Number = Field(ge=LEAST_SECONDS, le=MOST_SECONDS)
    annotations: list[Any] = []


def _check_action(
    video_id: str, place: str, raw: Any, duration: float | None, rules: Rules
) -> tuple[Instance | None, Instance | None, list[Repair], list[str]]:
    """Return an action for use and as written, its repairs, and its problems."""
    try:
        action = _Action.model_validate(raw)
    except ValidationError as error:
        return None, None, [], _reasons(error, place)
    start, end = action.segment
    trimmed = Fault.SPACED in rules.dataset.repaired
    label = action.label.strip() if trimmed else action.label
    limit = float("inf") if duration is None else duration
    faults = _faults(start, end, limit)
    problems = [
        f"{place}.segment: {_phrase(fault, limit)} (found {raw['segment']!r:.60})"
        for fault in faults
        if fault not in rules.dataset.repaired
    ]
    known = rules.classes is None or label in rules.classes | rules.dataset.ambiguous
    if not label.strip():
        problems.append(f"{place}.label: is nothing but spaces (found {action.label!r:.60})")
    elif not known:
        problems.append(f"{place}.label: is not a known class (found {action.label!r:.60})")
    if problems:
        return None, None, [], problems
    inside = Instance(start=max(start, 0.0), end=min(end, limit), label=label)
    written = Instance(start=start, end=end, label=label)
    kept = not faults or 2 * (inside.end - inside.start) >= end - start > 0  # half or more inside

    def repair(action_: Any, reason: str) -> Repair:
        there = replace(written, label=action.label)
        return Repair(video_id=video_id, action=action_, instance=there, reason=reason)

    repairs = [repair("trimmed", Fault.SPACED.value)] if label != action.label else []
    if faults:
        reason = " and ".join(_phrase(fault, limit) for fault in faults)
        repairs.append(repair("clipped" if kept else "dropped", reason))
    return inside if kept else None, written, repairs, []


def _faults(start: float, end: float, duration: float) -> list[Fault]:
    """List the faults of a segment in a video of `duration` seconds."""
    if end == start:
        return [Fault.EMPTY]
    if end < start:
        return [Fault.REVERSED]
    late = start >= duration or end > duration + DURATION_TOLERANCE
    return [*([Fault.EARLY] if start < 0 else []), *([Fault.LATE] if late else [])]


def _phrase(fault: Fault, duration: float) -> str:
    return f"{fault.value} of {duration:g} s" if fault is Fault.LATE else fault.value


def _implied(video_id: str, instances: Iterable[Instance], rules: Rules) -> Iterator[Repair]:
    """Yield the instances of wider labels that the record implies and the file lacks."""
    there = set(instances)
    for instance in sorted(there, key=_order):
        wider = rules.dataset.implied.get(instance.label)
        if wider is None or (rules.classes is not None and wider not in rules.classes):
            continue
        twin = Instance(start=instance.start, end=instance.end, label=wider)
        if twin not in there:
            reason = f"every {instance.label} is {wider} as well"
            yield Repair(video_id=video_id, action="added", instance=twin, reason=reason)


def _order(instance: Instance) -> tuple[float, float, str]:
    return instance.start, instance.end, instance.label


def _place(number: int, action: Any) -> str:
    """Name the place of an action, by its id if it has one: rows of a table have no number."""
    own = action.get("id") if isinstance(action, dict) else None
    return f"annotations[{number}]" if own is None else f"annotation {own!r:.60}"


def _reasons(error: ValidationError, *place: str) -> list[str]:
    """Format the problems of the entry, or of the action at a place in it."""
    hint = {"duration: is missing": "; durations can be given apart from the file (durations)"}
    found = [
        problem_of(details, in_words((*place, *details["loc"])) or "the entry")
        for details in error.errors()
    ]
    return [text + hint.get(text, "") for text in found]


def _id_problems(video_id: str) -> Iterator[str]:
    """Yield reasons why an id cannot be the plain name of a file in the video folder."""
    if not video_id or video_id in {".", ".."}:
        yield "the id does not name a file"
    elif any(character in "/\\" for character in video_id):
        yield "the id holds a path separator and could point outside the video folder"
    elif any(unicodedata.category(character) in {"Cc", "Cs"} for character in video_id):
        yield "the id holds a control character, which no file name should"


def check_durations(
    annotations: Annotations,
    measured: Mapping[str, float],
    *,
    tolerance: float = DURATION_TOLERANCE,
) -> dict[str, str]:
    """Compare the annotated duration of each video with that of its file.

    If a file was cut, or converted to another frame rate with a wrong duration, all actions of the
    video are in the wrong place, and only the duration shows it.

    Args:
        annotations: annotations to check.
        measured: video id -> duration of its file in seconds; other videos are not checked.
        tolerance: seconds by which the two may differ.

    Returns:
        Video id -> sentence, for each video whose durations differ by more, in the order of videos.
    """
    problems = {}
    for video in annotations.videos:
        seconds = measured.get(video.video_id, video.duration)
        if not abs(seconds - video.duration) <= tolerance:  # true for NaN too
            last = max((i.end for i in video.instances), default=0.0)
            lost = f", and actions in it reach up to {last:g} s" if last > seconds else ""
            problems[video.video_id] = (
                f"video {video.video_id!r}: its file lasts {seconds:g} s, its annotation says "
                f"{video.duration:g} s{lost}; get the original file, or exclude it"
            )
    return problems
