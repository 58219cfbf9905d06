"""Packages that are not there at all; nothing is imported for it but the standard library."""

import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from pipelines.diagnostics.finding import Finding, fail

PROJECT = "re2tal"
CHECK = "versions"


def installed(name: str) -> str | None:
    """The version of an installed package, None if it is not there.

    Args:
        name: as pip knows it.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def stated_requirements() -> list[str]:
    """What the installed project needs, as pyproject.toml states it; nothing if it is not there."""
    try:
        return requires(PROJECT) or []
    except PackageNotFoundError:
        return []


def check_missing(
    stated: Sequence[str], *, find: Callable[[str], str | None] = installed
) -> list[Finding]:
    """Looks for packages without which the other checks cannot even be imported.

    Args:
        stated: requirements, of which those of the scripts count.
        find: gives the version of a package, None if it is not there.

    Returns:
        A failure if some are missing, else nothing.
    """
    needed = [one.partition(";")[0].strip() for one in stated if _counts(one)]
    missing = [one for one in needed if not find(re.split(r"[^\w.-]", one, maxsplit=1)[0])]
    if not missing:
        return []
    text = (
        f"Not installed: {', '.join(missing)}. Run `make train`, which sets up .venv, or "
        "`pip install -e '.[pipelines]'`. The other checks need them, and were not tried."
    )
    return [fail(CHECK, text)]


def _counts(requirement: str) -> bool:
    extra = re.search(r"extra == .(\w+)", requirement)
    return extra is None or extra[1] == "pipelines"
