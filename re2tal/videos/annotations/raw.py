"""Annotations as files have them, brought to one shape but not checked yet."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from re2tal.videos.annotations.collection import AnnotationError


@dataclass(frozen=True, kw_only=True, slots=True)
class RawCollection:
    """What the reader of one form returns.

    Attributes:
        videos: Video id -> an entry in ActivityNet's shape, `{"subset", "duration", "annotations":
            [{"segment": [start, end], "label"}]}`. Anything in it may be missing or wrong: it is
            judged in one place, whatever the form. An annotation may have an "id" of its own.
        problems: What is wrong with the file itself.
        classes: Every label of the data set, where the files list them.
        excluded: Video id -> why the data set's own rules leave it out.
    """

    videos: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    excluded: Mapping[str, str] = field(default_factory=dict)


class JsonObject(dict[str, Any]):
    """A JSON object that remembers which of its keys were given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        keys = [key for key, _ in pairs] if len(self) < len(pairs) else []
        self.repeated = sorted({key for key in keys if keys.count(key) > 1})


def read_text(path: Path, *, source: str | None = None) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        AnnotationError: It cannot be read; `source`, or the path, is what the error names.
    """
    source = source or str(path)
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise AnnotationError(source, ["there is no such file"]) from error
    except OSError as error:
        raise AnnotationError(source, [f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise AnnotationError(source, [f"is not a text in UTF-8: {error}"]) from error


def read_json(path: Path) -> Any:
    """A JSON document whose objects are `JsonObject`.

    Raises:
        AnnotationError: The file cannot be read or holds no JSON text.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=JsonObject)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(str(path), [f"is not a JSON text: {error}"]) from error
