"""The files of `cluster/`, and what a test changes in them."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
PLACEHOLDER = re.compile(r"<<([A-Z][A-Z_]*)>>")

Document = dict[str, Any]

# values that would be secrets if they stood in a file
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN$|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)


def documents(path: Path) -> list[Document]:
    """Returns the YAML documents of a file."""
    return list(yaml.safe_load_all(path.read_text()))


def changed(document: Document, where: str, value: Any) -> Document:
    """Returns a document with another value at one place.

    Args:
        document: stays as it is.
        where: keys and positions with slashes between them.
        value: what is there then; `...` removes what is there.
    """
    result = copy.deepcopy(document)
    *parents, last = where.split("/")
    place: Any = result
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return result


def dictionaries(value: Any) -> Iterator[Document]:
    """Goes through all dictionaries in a value, the outer ones first."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, dict | list):
            yield from dictionaries(part)


def pinned(package: str) -> str:
    """Returns the version of a package in requirements.txt."""
    found = re.search(rf"^{package}==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert found, package
    return found[1]


def is_pinned(image: str) -> bool:
    """Whether an image is named by its version or digest, or is the user's to name."""
    name, _, version = image.rpartition(":")
    whole = PLACEHOLDER.fullmatch(image) or "@sha256:" in image
    return bool(whole) or (bool(name) and bool(re.match(r"v?\d[^/]*$", version)))
