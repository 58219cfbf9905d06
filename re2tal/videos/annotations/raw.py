"""Annotations as files have them, brought to one shape but not checked yet."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from re2tal import json_files
from re2tal.json_files import FileError, RepeatedKey
from re2tal.videos.annotations.collection import AnnotationError


@dataclass(frozen=True, kw_only=True, slots=True)
class RawCollection:
    """What the reader of one form returns.

    Attributes:
        videos: Video id -> an entry in ActivityNet's shape, `{"subset", "duration", "annotations":
            [{"segment": [start, end], "label"}]}`. Anything in it may be missing or wrong: it is
            judged in one place, whatever the form. An annotation may have an "id" of its own.
        problems: What is wrong with the file itself.
        repeated: Video id -> a phrase for each key that its entry, or an object in it, has more
            than once; this too is judged only where the video is used.
        classes: Every label of the data set, where the files list them.
        excluded: Video id -> why the data set's own rules leave it out.
    """

    videos: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    repeated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    excluded: Mapping[str, str] = field(default_factory=dict)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        AnnotationError: It cannot be read.
    """
    try:
        return json_files.read_text(path)
    except FileError as error:
        raise AnnotationError(error.source, error.problems) from error


def read_json(path: Path) -> tuple[Any, tuple[RepeatedKey, ...]]:
    """A JSON document, and the keys that objects in it have more than once.

    Raises:
        AnnotationError: The file cannot be read or holds no JSON text.
    """
    try:
        return json_files.read_json(path)
    except FileError as error:
        raise AnnotationError(error.source, error.problems) from error
