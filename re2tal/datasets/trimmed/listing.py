"""A list of trimmed videos as it is written down, and the files that it means."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from re2tal.annotations import AnnotationError
from re2tal.videos.files import EXTENSIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a trimmed video may lie.

    Attributes:
        name: Path of the file in the folder of the videos, with slashes; with or without its
            ending.
        start: Where the stretch begins in that file, in seconds.
        end: Where it ends; None for the end of the file.
    """

    name: str
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of a list.

    Attributes:
        video_id: Its name; no other entry of the list has it.
        label: Name of its class.
        places: Where it may lie; the first where there is a file counts.
    """

    video_id: str
    label: str
    places: tuple[Place, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimmedList:
    """The trimmed videos of a subset.

    Attributes:
        source: Where the list is, for messages.
        root: Of lists with the same root, equal ids mean the same video.
        entries: In the order of the list.
        problems: What is wrong with it, a sentence each.
    """

    source: str
    root: str = ""
    entries: tuple[Entry, ...]
    problems: tuple[str, ...] = ()


def joint_classes(
    training: TrimmedList, validation: TrimmedList, classes: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The classes of two lists, once both are without fault.

    Args:
        training: What is trained on.
        validation: What is evaluated.
        classes: All classes in the order of their numbers; None for those of the training list,
            sorted.

    Raises:
        AnnotationError: With every problem of both lists: their own, entries that stand twice, or
            in both, and labels that are no class.
    """
    lists = (training,) if training == validation else (training, validation)
    known = tuple(classes) if classes is not None else _labels(training)
    problems = [
        f"{listing.source}: {problem}"
        for listing in lists
        for problem in (*listing.problems, *_problems(listing, known))
    ]
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
    """What is wrong with the entries among themselves and with their labels."""
    if not listing.entries and not listing.problems:
        yield "has no video"
    numbers = Counter(entry.video_id for entry in listing.entries)
    for video_id, number in numbers.items():
        if number > 1:
            yield f"{video_id} stands in it {number} times"
    for label in _labels(listing):
        if label not in classes:
            yield f"{label!r} is not among the {len(classes)} classes"


def find_files(
    entries: Sequence[Entry], files: Mapping[str, str]
) -> tuple[dict[str, tuple[str, Place]], dict[str, str]]:
    """Finds the file of every entry among those that a folder holds.

    Names are compared and never joined to a path, so that none can point outside the folder. A name
    is looked for as it is, and then with each of `EXTENSIONS` in the place of its ending.

    Args:
        entries: What to look for.
        files: The folder's files: path in it, with slashes -> path or URI.

    Returns:
        Video id -> file, and the place that was found; for the others, video id -> why there is no
        file.
    """
    by_stem: dict[str, str] = {}
    for extension in reversed(EXTENSIONS):  # the first of them counts
        endings = {n: u for n, u in files.items() if PurePosixPath(n).suffix.lower() == extension}
        by_stem |= {_stem(name): uri for name, uri in endings.items()}
    found: dict[str, tuple[str, Place]] = {}
    missing: dict[str, str] = {}
    for entry in entries:
        for place in entry.places:
            uri = files.get(place.name) or by_stem.get(place.name) or by_stem.get(_stem(place.name))
            if uri is not None:
                found[entry.video_id] = uri, place
                break
        else:
            names = " or ".join(place.name for place in entry.places)
            missing[entry.video_id] = f"there is no file {names}"
    return found, missing


def _stem(name: str) -> str:
    """A path without the ending of a video; what follows another dot belongs to the name."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in EXTENSIONS else name
