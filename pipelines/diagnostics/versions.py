"""Versions of what is installed here, against the ranges that pyproject.toml states."""

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipelines.diagnostics.finding import Finding, fail, ok
from pipelines.diagnostics.missing import PROJECT, installed

CHECK = "versions"
_EXTRAS = ("", "pipelines")  # those of the scripts; `backbones` is needed by who uses those
_SHOWN = ("torch", "torchvision", "ray", "mlflow", "optuna", "av", "pyarrow")


def project_ranges() -> tuple[str, list[str]]:
    """What the installed project needs.

    Returns:
        Range of Python, and requirements as pyproject.toml states them.

    Raises:
        PackageNotFoundError: if the project is not installed.
    """
    return metadata(PROJECT)["Requires-Python"] or "", requires(PROJECT) or []


def check_installation() -> list[Finding]:
    """Looks at the Python that runs this, and at what is installed in it."""
    try:
        python, stated = project_ranges()
    except PackageNotFoundError:
        text = (
            f"{PROJECT} is not installed in this Python: run `make train`, which sets up .venv, or "
        )
        return [fail(CHECK, f"{text}`pip install -e '.[pipelines]'`.")]
    return check_versions(stated, requires_python=python, python=platform.python_version())


def check_versions(
    stated: Sequence[str],
    *,
    requires_python: str,
    python: str,
    find: Callable[[str], str | None] = installed,
) -> list[Finding]:
    """Compares versions with ranges.

    Args:
        stated: requirements, of which those of the scripts count.
        requires_python: range of Python.
        python: its version.
        find: gives the version of a package, None if it is not there.

    Returns:
        A failure for each that does not fit, or one line that lists the most important.
    """
    needed = [one for one in map(Requirement, stated) if _counts(one)]
    found = {one.name: find(one.name) for one in needed}
    wrong = [_wrong(one, found[one.name]) for one in needed if not _fits(one, found[one.name])]
    if not SpecifierSet(requires_python).contains(python, prereleases=True):
        wrong.insert(
            0,
            f"This is Python {python}, but {PROJECT} needs {requires_python}: set up the "
            "environment anew with `make PYTHON=/path/to/python3`.",
        )
    return [fail(CHECK, text) for text in wrong] or [ok(CHECK, _listed(python, found))]


def _counts(requirement: Requirement) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in _EXTRAS)


def _fits(requirement: Requirement, found: str | None) -> bool:
    # builds of the day count: who has them chose them
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _wrong(requirement: Requirement, found: str | None) -> str:
    name, wanted = requirement.name, str(requirement.specifier)
    what = f"{name} is not installed" if found is None else f"{name} {found} is installed"
    advice = f"run `make train`, or `pip install '{name}{wanted}'`"
    return f"{what}, but {PROJECT} needs {name}{wanted}: {advice}."


def _listed(python: str, found: Mapping[str, str | None]) -> str:
    shown = ", ".join(f"{name} {found[name]}" for name in _SHOWN if name in found)
    return f"Python {python}, {shown}: all {len(found)} packages are in the ranges of {PROJECT}."
