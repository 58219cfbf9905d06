"""Annotated videos of any data set: `Annotations` and its parts."""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from re2tal import json_files
from re2tal.json_files import FileError, RepeatedKey, by_kind

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """One action: its `label`, from second `start` to second `end` of its video."""

    start: float
    end: float
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoAnnotation:
    """One video: its `duration` in seconds and its instances by start; there may be none.

    Attributes:
        ambiguous: segments in which annotators could not tell if there is an action. They have no
            class: nothing is learnt from them, and a detection there is not a false positive.
        published: instances as in the file, to which published results refer, if any of `instances`
            was clipped or left out; None if they are the same.
    """

    video_id: str
    subset: str
    duration: float
    instances: tuple[Instance, ...] = ()
    ambiguous: tuple[Instance, ...] = ()
    published: tuple[Instance, ...] | None = None

    @property
    def evaluated(self) -> tuple[Instance, ...]:
        """Instances as published: the ground truth of evaluations."""
        return self.instances if self.published is None else self.published


@dataclass(frozen=True, kw_only=True, slots=True)
class Exclusion:
    """Video of the file that is not used, with the reason."""

    video_id: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """Change of one instance, without which the data set could not be used.

    Attributes:
        instance: instance as in the file or, if `action` is "added", the added one.
        reason: fault of the instance.
    """

    video_id: str
    action: Literal["clipped", "dropped", "added", "trimmed"]
    instance: Instance
    reason: str


class AnnotationError(FileError):
    """Error of annotations that cannot be used; each problem names the video and the reason.

    The message lists all problems, but only a few examples of one that occurs in many videos.
    """

    def __str__(self) -> str:
        shown = by_kind(self.problems)
        hint = (
            (f"(`python -m re2tal.datasets {self.source}` lists all of them.)",)
            if len(shown) < len(self.problems)
            else ()
        )
        return self._text((*shown, *hint))

    @property
    def listed(self) -> str:
        """Message with all problems, for correction by hand."""
        return self._text(self.problems)

    def _text(self, shown: Iterable[str]) -> str:
        what = (
            f"{self.source}: {self.count}. Correct or remove what is listed here, then run again."
        )
        return "\n  - ".join((what, *shown))


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotations:
    """Annotated videos.

    Attributes:
        classes: all labels, sorted; the index in this tuple is the class number.
        videos: videos, sorted by id.
        excluded: videos of the file that were left out, sorted by id.
        repairs: changes in the used videos, in the order of the videos.
    """

    classes: tuple[str, ...]
    videos: tuple[VideoAnnotation, ...]
    excluded: tuple[Exclusion, ...] = ()
    repairs: tuple[Repair, ...] = ()

    @property
    def ambiguous(self) -> dict[str, tuple[Instance, ...]]:
        """Video id -> its ambiguous segments, for videos that have any."""
        return {video.video_id: video.ambiguous for video in self.videos if video.ambiguous}

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex of the used content, independent of its order and layout.

        Exclusions, repairs and ambiguous segments are included, so two runs with the same
        fingerprint used the same data in the same way. The wording of reasons is not included.
        """
        videos = sorted(
            [v.video_id, v.subset, v.duration, _instances(v.instances)] for v in self.videos
        )
        content: list[Any] = [sorted(self.classes), videos]
        treatment = [
            sorted([video_id, _instances(found)] for video_id, found in self.ambiguous.items()),
            sorted(exclusion.video_id for exclusion in self.excluded),
            sorted([r.video_id, r.action, *_instances([r.instance])] for r in self.repairs),
            sorted([v.video_id, _instances(v.published)] for v in self.videos if v.published),
        ]
        if any(treatment):  # without treatment, the fingerprint is that of earlier versions
            content.append(treatment)
        text = json.dumps(content, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def subset(self, name: str) -> "Annotations":
        """Select the videos of one subset and their repairs; all classes are kept.

        Args:
            name: name of the subset in the file ("training", "validation", ...).

        Raises:
            AnnotationError: no video is in that subset; the message lists the existing ones.
        """
        videos = tuple(video for video in self.videos if video.subset == name)
        if not videos:
            there = ", ".join(repr(s) for s in sorted({v.subset for v in self.videos})) or "none"
            raise AnnotationError(
                "annotations", [f"no video is in the subset {name!r}; subsets there are: {there}"]
            )
        kept = {video.video_id for video in videos}
        repairs = tuple(repair for repair in self.repairs if repair.video_id in kept)
        return replace(self, videos=videos, repairs=repairs)

    def chosen(self, subsets: Iterable[str]) -> tuple[VideoAnnotation, ...]:
        """Return the videos of some subsets, or all videos if none is named.

        Raises:
            AnnotationError: a subset has no video; see `subset`.
        """
        return tuple(v for name in subsets for v in self.subset(name).videos) or self.videos


def _instances(instances: Iterable[Instance]) -> list[list[float | str]]:
    """Convert instances to sorted plain lists."""
    return sorted([i.start, i.end, i.label] for i in instances)


@dataclass(frozen=True, kw_only=True, slots=True)
class RawCollection:
    """Result of a form's reader, before the entries are checked.

    Attributes:
        videos: video id -> entry in ActivityNet's shape, `{"subset", "duration", "annotations":
            [{"segment": [start, end], "label"}]}`. Anything in it may be missing or wrong: one
            place checks the entries of all forms. An annotation may have an "id".
        problems: problems of the file itself.
        repeated: video id -> message for each repeated key of its entry, or of an object in it; it
            is a problem only if the video is used.
        classes: all labels of the data set, if the files list them.
        excluded: video id -> reason why the data set's own rules leave it out.
    """

    videos: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    repeated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    excluded: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bins:
    """Intervals of a characteristic, open below and closed above.

    Bin i holds values in `(edges[i - 1], edges[i]]`; the first and the last have no outer limit.

    Attributes:
        edges: B - 1 inner limits, rising.
        names: B names.
    """

    edges: tuple[float, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.edges) + 1 or list(self.edges) != sorted(set(self.edges)):
            raise ValueError(
                f"Bins need rising inner limits and one name more than those, but got "
                f"{self.edges} and {self.names}."
            )

    def place(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Find the index of the bin of each of the `values` `(N,)`."""
        return np.searchsorted(self.edges, values, side="left")


@dataclass(frozen=True, kw_only=True, slots=True)
class Characteristics:
    """Bins of an instance's characteristics, for the diagnosis of a detector's errors.

    Attributes:
        coverage: bins of the length as a share of the video's duration. Instances that end after
            their video may fall into the last bin (DETAD drops them).
        length: bins of the length in seconds.
        instances: bins of the number of instances of any class in the instance's video, counted as
            in DETAD's annotation files.
    """

    coverage: Bins
    length: Bins
    instances: Bins


def labels_alike(counts: Mapping[str, int], *, spaces: str = "") -> Iterator[str]:
    """Find labels that differ only in spaces, case or Unicode's normal form: typing errors.

    Args:
        counts: label -> number of its instances; 0 for a name that must be kept.
        spaces: hint how to remove outer spaces, appended if labels differ in those.

    Yields:
        A message for each group of such labels, with the correction.
    """
    groups: dict[str, list[str]] = {}
    # the names of the data set itself, with a count of 0, come first
    for label in sorted(counts, key=lambda label: (counts[label] > 0, -counts[label], label)):
        plain = " ".join(unicodedata.normalize("NFKC", label).split()).casefold()
        groups.setdefault(plain, []).append(label)
    for alike in groups.values():
        if len(alike) < 2:
            continue
        # normal forms of a character look the same, so show their code points
        shown = (
            ascii if len({unicodedata.normalize("NFC", x) for x in alike}) < len(alike) else repr
        )
        listed = ", ".join(f"{shown(label)} ({counts[label]:,} times)" for label in alike)
        way = spaces if len({label.strip() for label in alike}) < len(alike) else ""
        yield (
            f"the labels {listed} differ only in spaces, case or Unicode's normal form and would "
            f"be {len(alike)} classes: write {shown(alike[0])} for all of them{way}"
        )


def read_text(path: Path) -> str:
    """Read a UTF-8 file without its byte order mark; raise `AnnotationError` if that fails."""
    try:
        return json_files.read_text(path)
    except FileError as error:
        raise AnnotationError(error.source, error.problems) from error


def read_json(path: Path) -> tuple[Any, tuple[RepeatedKey, ...]]:
    """Read a JSON file like `re2tal.json_files.read_json`, but raise `AnnotationError`."""
    try:
        return json_files.read_json(path)
    except FileError as error:
        raise AnnotationError(error.source, error.problems) from error


def normal_form(name: str) -> str:
    """Convert a name to the form in which names are compared, Unicode's NFC.

    A letter with an accent, a Korean syllable or a Japanese one with a mark can be one code point
    or several; in names from macOS they are several.
    """
    return unicodedata.normalize("NFC", name)


def as_named(found: Mapping[str, _Value], names: Iterable[str]) -> dict[str, _Value]:
    """Rename entries to those of `names` that differ only in Unicode's normal form."""
    known = {normal_form(name): name for name in names}
    renamed = {known.get(normal_form(name), name): value for name, value in found.items()}
    return renamed | {name: found[name] for name in known.values() if name in found}
