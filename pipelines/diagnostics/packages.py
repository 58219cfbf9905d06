"""Packages that are missing, or outside the ranges that pyproject.toml states.

Only the standard library is imported before all packages are known to be there.
"""

import platform
import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from pipelines.diagnostics.findings import Finding, fail, ok

PROJECT = "re2tal"
_SET_UP = "Run `make train`, which sets up .venv, or `pip install -e '.[pipelines]'`."
_SHOWN = ("torch", "torchvision", "ray", "mlflow", "optuna", "av", "pyarrow")

Find = Callable[[str], str | None]


def installed(name: str) -> str | None:
    """Return the version of a package by its name in pip; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def requirements(project: str = PROJECT) -> list[str]:
    """List the requirements of the scripts in pyproject.toml; none if it is not installed."""
    try:
        stated = requires(project) or []
    except PackageNotFoundError:
        return []
    return [one.partition(";")[0].strip() for one in stated if _counts(one)]


def _counts(stated: str) -> bool:
    extra = re.search(r"extra == .(\w+)", stated)  # users of a backbone's library need `backbones`
    return extra is None or extra[1] == "pipelines"


def check_missing(needed: Sequence[str], *, find: Find = installed) -> list[Finding]:
    """Look for packages without which the other checks cannot be imported.

    Returns:
        A failure if some are missing, else nothing.
    """
    missing = [one for one in needed if not find(re.split(r"[^\w.-]", one, maxsplit=1)[0])]
    if not missing:
        return []
    text = f"Not installed: {', '.join(missing)}. {_SET_UP} The other checks need them, and were "
    return [fail(f"{text}not tried.")]


def check_versions(
    needed: Sequence[str],
    *,
    project: str = PROJECT,
    python: str = platform.python_version(),
    find: Find = installed,
) -> list[Finding]:
    """Compare the versions of Python and of all packages with the ranges.

    Args:
        needed: requirements, none of them missing.
        project: name of the package that states the range of Python.
        python: version of Python.
        find: function like `installed`.

    Returns:
        A failure for each version out of range, or one line that lists the most important.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if not installed(project):
        return [fail(f"{project} is not installed in this Python. {_SET_UP}")]
    findings = []
    wanted = metadata(project)["Requires-Python"] or ""
    if not SpecifierSet(wanted).contains(python, prereleases=True):
        text = f"This is Python {python}, but {project} needs {wanted}: set up the environment anew"
        findings.append(fail(f"{text} with `make PYTHON=/path/to/python3`."))
    found = {}
    for one in map(Requirement, needed):
        found[one.name] = there = find(one.name) or "none"
        # nightly builds are accepted: their user chose them
        if not one.specifier.contains(there, prereleases=True):
            text = f"{one.name} {there} is installed, but {project} needs {one.name}{one.specifier}"
            advice = f"run `make train`, or `pip install '{one.name}{one.specifier}'`"
            findings.append(fail(f"{text}: {advice}."))
    shown = ", ".join(f"{name} {found[name]}" for name in _SHOWN if name in found)
    text = f"Python {python}, {shown}: all {len(found)} packages are in the ranges of {project}."
    return findings or [ok(text)]
