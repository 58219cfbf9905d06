"""Lists of trimmed videos of one class each, and the search for their files.

A list is a folder with a subfolder of videos for each class (`read_folders`), or a text file
(`read_list`). The three forms of text files are distinguished by their content:

- Kinetics' own CSV: a header with `label`, `youtube_id`, `time_start`, `time_end` and `split`. A
  video's file is named as by the usual download tools, `<label>/<id>_<start>_<end>.mp4` with
  seconds of six digits, with or without the folder; or it is the whole video, `<id>.mp4`, from
  which that part is used.
- A CSV with a header that has `path` and `label`, and optionally `start`, `end` and `split`.
- Lines of `path label` or `path label start end`, as in MMAction2 and PySlowFast; the label is a
  class number, or a name without spaces. The path may contain spaces.

Seconds count from the start of the video file.
"""

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from re2tal.annotations import AnnotationError, labels_alike, normal_form
from re2tal.videos.files import EXTENSIONS, is_video


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Possible place of a trimmed video.

    Attributes:
        name: path of the file in the folder of the videos, with slashes, with or without its
            extension.
        start: second of that file at which the video begins.
        end: second of that file at which the video ends; None for the end of the file.
    """

    name: str
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of a list.

    Attributes:
        video_id: name of the video, unique in the list.
        label: name of its class.
        places: possible places; the first one that has a file is used.
    """

    video_id: str
    label: str
    places: tuple[Place, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimmedList:
    """Trimmed videos of a subset.

    Attributes:
        source: place of the list, for messages.
        root: common origin: in lists with the same root, equal ids mean the same video.
        entries: entries in the order of the list.
        problems: problems of the list, one sentence each.
    """

    source: str
    root: str = ""
    entries: tuple[Entry, ...]
    problems: tuple[str, ...] = ()


def joint_classes(
    training: TrimmedList, validation: TrimmedList, classes: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Check two lists and return their classes.

    Args:
        training: list for training.
        validation: list for evaluation.
        classes: all classes in the order of their numbers; None for those of the training list,
            sorted.

    Raises:
        AnnotationError: the lists have problems, repeated or common entries, or unknown labels; all
            of them are listed.
    """
    lists = (training,) if training == validation else (training, validation)
    known = tuple(classes) if classes is not None else _labels(training)
    problems = [
        f"{listing.source}: {problem}"
        for listing in lists
        for problem in (*listing.problems, *_problems(listing, known))
    ]
    if classes is None:
        counts = Counter(e.label for listing in lists for e in listing.entries)
        problems += [f"{training.source}: {problem}" for problem in labels_alike(counts)]
    if training == validation:
        problems.append(f"{training.source}: is both the training and the validation list")
    elif training.root == validation.root:
        both = _ids(training) & _ids(validation)
        problems += [
            f"{validation.source}: {video_id} is in the training list too"
            for video_id in sorted(both)
        ]
    if problems:
        raise AnnotationError("The lists of trimmed videos", problems)
    return known


def _labels(listing: TrimmedList) -> tuple[str, ...]:
    return tuple(sorted({entry.label for entry in listing.entries}))


def _ids(listing: TrimmedList) -> set[str]:
    return {entry.video_id for entry in listing.entries}


def _problems(listing: TrimmedList, classes: Sequence[str]) -> Iterator[str]:
    """Yield the problems of a list: no videos, repeated entries, unknown labels."""
    if not listing.entries and not listing.problems:
        yield "has no video"
    numbers = Counter(entry.video_id for entry in listing.entries)
    for video_id, number in numbers.items():
        if number > 1:
            yield f"{video_id} is listed {number} times"
    for label in _labels(listing):
        if label not in classes:
            yield f"{label!r} is not among the {len(classes)} classes"


def find_files(
    entries: Sequence[Entry], files: Mapping[str, str]
) -> tuple[dict[str, tuple[str, Place]], dict[str, str]]:
    """Find the file of every entry among the files of a folder.

    Names are compared and never joined to a path, so none can point outside the folder. A name is
    searched unchanged, and then with each of `EXTENSIONS` in place of its extension.

    Args:
        entries: entries to find.
        files: files of the folder: path in it, with slashes -> path or URI.

    Returns:
        Video id -> file and the place that was found; and, for other videos, video id -> reason.
    """
    files = {normal_form(name): uri for name, uri in files.items()}
    by_stem: dict[str, str] = {}
    for extension in reversed(EXTENSIONS):  # so that the first extension overwrites the others
        endings = {n: u for n, u in files.items() if PurePosixPath(n).suffix.lower() == extension}
        by_stem |= {_stem(name): uri for name, uri in endings.items()}
    found: dict[str, tuple[str, Place]] = {}
    missing: dict[str, str] = {}
    for entry in entries:
        for place in entry.places:
            name = normal_form(place.name)
            uri = files.get(name) or by_stem.get(name) or by_stem.get(_stem(name))
            if uri is not None:
                found[entry.video_id] = uri, place
                break
        else:
            names = " or ".join(place.name for place in entry.places)
            missing[entry.video_id] = f"there is no file {names}"
    return found, missing


def _stem(name: str) -> str:
    """Remove a video's extension from a path; any other text after a dot belongs to the name."""
    return str(PurePosixPath(name).with_suffix("")) if is_video(name) else name


def read_folders(source: str, names: Iterable[str]) -> TrimmedList:
    """List the videos of a folder; the subfolder of a video names its class.

    Files without a video's extension are ignored.

    Args:
        source: place of the folder, for messages.
        names: paths of the files in it, with slashes.
    """
    entries, problems = [], []
    for name in sorted(names):
        path = PurePosixPath(name)
        if not is_video(name):
            continue
        if len(path.parts) < 2:
            problems.append(f"{name} is not in the folder of a class")
            continue
        entries.append(
            Entry(
                video_id=str(path.with_suffix("")),
                label=path.parts[0],
                places=(Place(name=name),),
            )
        )
    return TrimmedList(source=source, root=source, entries=tuple(entries), problems=tuple(problems))


_KINETICS = {"label", "youtube_id", "time_start", "time_end"}
_PATHS = {"path", "label"}
# The path is the text before the last one or three words, and may contain spaces.
_NUMBER = r"[-+]?\d+(?:\.\d*)?"
_LINE = re.compile(
    rf"(?P<path>\S.*?)[\s,]+(?P<label>[^\s,]+?)(?:[\s,]+(?P<start>{_NUMBER})[\s,]+(?P<end>{_NUMBER}))?"
)


def read_classes(source: str, text: str) -> tuple[str, ...]:
    """Read class names, one per line; the number of a class is that of its line, from 0.

    Args:
        source: place of the text, for messages.
        text: content of the file.

    Raises:
        AnnotationError: the text has no names, or repeats one.
    """
    names = [line.strip() for line in text.splitlines() if line.strip()]
    repeated = [name for name, number in Counter(names).items() if number > 1]
    problems = [f"{name!r} is listed more than once" for name in repeated]
    if problems or not names:
        raise AnnotationError(source, problems or ["it has no class names"])
    return tuple(names)


def read_list(
    source: str, text: str, *, classes: Sequence[str] | None = None, split: str | None = None
) -> TrimmedList:
    """Read a list in one of the three forms.

    Args:
        source: place of the text, for messages.
        text: content of the file.
        classes: names of the classes, for labels that are numbers.
        split: value of the column `split` in the rows to read; None for all rows.

    Returns:
        The valid entries, and the problems of the others.
    """
    lines = text.splitlines()
    header = [name.strip() for name in lines[0].split(",")] if lines else []
    if set(header) >= _KINETICS or set(header) >= _PATHS:
        rows = _table(lines, header, split)
    elif split is not None:
        problem = f"it has no column 'split', in which rows of {split!r} were to be selected"
        return TrimmedList(source=source, entries=(), problems=(problem,))
    else:
        rows = _lines(lines)
    entries, problems = [], []
    for number, row in rows:
        try:
            entries.append(_entry(row, classes))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if split is not None and not (entries or problems):
        problems.append(f"no row has {split!r} in its column 'split'")
    return TrimmedList(source=source, entries=tuple(entries), problems=tuple(problems))


def _table(
    lines: Sequence[str], header: Sequence[str], split: str | None
) -> Iterator[tuple[int, Mapping[str, str]]]:
    reader = csv.DictReader(lines[1:], fieldnames=header, restval="")
    for raw in reader:
        row = {name: value.strip() for name, value in raw.items() if isinstance(value, str)}
        if split is None or row.get("split") == split:
            yield reader.line_num + 1, row


def _lines(lines: Sequence[str]) -> Iterator[tuple[int, Mapping[str, str]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        row = match.groupdict(default="") if match else {"path": line.strip()}
        yield number, row


def _entry(row: Mapping[str, str], classes: Sequence[str] | None) -> Entry:
    """Read one row as an entry; raise a ValueError if it is invalid."""
    label = _label(row.get("label", ""), classes)
    if "youtube_id" in row:
        start, end = (_seconds(row[name], name) for name in ("time_start", "time_end"))
        if start is None or end is None:
            raise ValueError("has no time_start or no time_end")
        _check_stretch(start, end)
        return _kinetics(row["youtube_id"], row["label"], label, start, end)
    name = row.get("path", "")
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is not the path of a file in the folder of the videos")
    start, end = _seconds(row.get("start", ""), "start"), _seconds(row.get("end", ""), "end")
    _check_stretch(start or 0.0, end)
    stretch = "" if start is None and end is None else f"@{start or 0:g}-{_ending(end)}"
    return Entry(
        video_id=f"{path.with_suffix('')}{stretch}",
        label=label,
        places=(Place(name=str(path), start=start or 0.0, end=end),),
    )


def _kinetics(youtube_id: str, folder: str, label: str, start: float, end: float) -> Entry:
    if not youtube_id or "/" in youtube_id:
        raise ValueError(f"{youtube_id!r} is not an id of a video")
    name = f"{youtube_id}_{start:06.0f}_{end:06.0f}"
    folders = dict.fromkeys((folder, folder.replace(" ", "_")))
    return Entry(
        video_id=name,
        label=label,
        places=(
            *(Place(name=f"{part}/{name}") for part in folders),
            Place(name=name),
            Place(name=youtube_id, start=start, end=end),
        ),
    )


def _ending(end: float | None) -> str:
    return "" if end is None else f"{end:g}"


def _label(text: str, classes: Sequence[str] | None) -> str:
    if not text:
        raise ValueError("has no label")
    if classes is not None and text in classes:
        return text
    if not re.fullmatch(r"\d+", text):
        return text  # if `classes` lacks it, `joint_classes` reports it as unknown
    if classes is None:
        raise ValueError(f"the label {text} is a number: give the names of the classes as well")
    if int(text) >= len(classes):
        raise ValueError(f"the label {text} is not one of 0 to {len(classes) - 1}")
    return classes[int(text)]


def _seconds(text: str, name: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} is not a number of seconds: {text!r}")
    return value


def _check_stretch(start: float, end: float | None) -> None:
    if start < 0 or (end is not None and end <= start):
        raise ValueError(f"the part from {start:g} to {_ending(end)} s has no length in the video")
