"""Reading of JSON files, with all of their problems in one error."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from re2tal.errors import UserError, shortened

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_SHOWN = 100  # of the wrong data set, each of a million rows may have a problem

Place = tuple[str | int, ...]


class FileError(UserError):
    """Error of a file that cannot be used.

    Attributes:
        source: path of the file.
        problems: all problems found in it, each with its place and reason.
    """

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__(source, self.problems)  # with these args the error can be pickled

    def __str__(self) -> str:
        shown = shortened(by_kind(self.problems), _SHOWN)
        return "\n  - ".join((f"{self.source}: {self.count}.", *shown))

    @property
    def count(self) -> str:
        """Number of the problems in words."""
        return "1 problem" if len(self.problems) == 1 else f"{len(self.problems):,} problems"


_ALIKE = 10  # problems of one kind that are listed one by one
_EXAMPLES = 3
_DETAILS = re.compile(r"""'.*?'|".*?"|\(found .*|[\d.]+""")


def by_kind(problems: Iterable[str]) -> list[str]:
    """Shorten problems of one kind to a few examples and their number.

    Problems are of one kind if they differ only in numbers, quoted names and the found value.
    """
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_DETAILS.sub("", problem), []).append(problem)
    return [
        line
        for alike in kinds.values()
        for line in shortened(
            alike, _EXAMPLES if len(alike) > _ALIKE else _ALIKE, rest=" like these"
        )
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class RepeatedKey:
    """Repeated key of an object; JSON readers keep only the last value.

    Attributes:
        place: keys and indices that lead to the object; empty for the top level.
        key: name of the repeated key.
    """

    place: Place
    key: str

    def __str__(self) -> str:
        where = f"{in_words(self.place)}: " if self.place else ""
        return f"{where}key {self.key!r} is there more than once"


def check_regular(path: str | Path) -> None:
    """Refuse a pipe, a socket or a device, because reading it might never end.

    Raises:
        FileError: the path is one of these, or does not exist.
    """
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError as error:
        raise FileError(str(path), ["there is no such file"]) from error
    except (OSError, ValueError) as error:  # ValueError for a name with a null character
        raise FileError(str(path), [f"cannot be read: {error}"]) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise FileError(str(path), ["is no regular file, but a pipe, a socket or a device"])


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, without a byte order mark.

    Raises:
        FileError: the file cannot be read, or is not a regular file.
    """
    source = str(path)
    check_regular(path)
    try:
        return Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise FileError(source, [f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise FileError(source, [f"is not a text in UTF-8: {error}"]) from error


def read_json(path: str | Path) -> tuple[Any, tuple[RepeatedKey, ...]]:
    """Read a JSON document and find the repeated keys of its objects.

    Returns:
        The document; its repeated keys in the order of the document, except those inside a value
        that a later value of the same key replaced.

    Raises:
        FileError: the file cannot be read or is not JSON.
    """
    # By id; the objects are kept alive, so that no id is used again.
    repeating: dict[int, tuple[dict[str, Any], list[str]]] = {}

    def remember(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            repeating[id(found)] = found, sorted({key for key in keys if keys.count(key) > 1})
        return found

    text = read_text(path)
    try:
        document = json.loads(text, object_pairs_hook=remember)
    except (ValueError, RecursionError) as error:
        raise FileError(str(path), [f"is not a JSON text: {error}"]) from error
    if not repeating:
        return document, ()
    return document, tuple(
        RepeatedKey(place=place, key=key)
        for place, value in places(document)
        if id(value) in repeating
        for key in repeating[id(value)][1]
    )


def in_words(place: Place) -> str:
    """Write a place as a path: `database.v_1.annotations[3]`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    return "".join(parts).removeprefix(".")


def problem_of(details: ErrorDetails, place: str | None = None) -> str:
    """Format a pydantic error: `results.x[3]: input should be a finite number (found nan)`.

    Args:
        details: one of `ValidationError.errors()`.
        place: place of the error; by default the path to it.
    """
    where = (in_words(details["loc"]) if place is None else place) or "the top level"
    if details["type"] == "missing":
        return f"{where}: is missing"
    message = details["msg"]
    own = message.removeprefix("Value error, ")
    if own != message:  # a message of ours, which may begin with a name, and names the value
        return f"{where}: {own.removesuffix('.')}"
    if details["type"] in ("model_type", "dataclass_type"):
        message = "must be an object"
    return f"{where}: {message[0].lower()}{message[1:]} (found {details['input']!r:.60})"


def places(document: Any) -> Iterator[tuple[Place, Any]]:
    """Yield every value of a document with its place, without recursion."""
    waiting: list[tuple[Place, Any]] = [((), document)]
    while waiting:
        place, value = waiting.pop()
        yield place, value
        items: list[tuple[str | int, Any]] = []
        if isinstance(value, dict):
            items = [*value.items()]
        elif isinstance(value, list):
            items = [*enumerate(value)]
        waiting += [((*place, key), inner) for key, inner in reversed(items)]
