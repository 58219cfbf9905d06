"""Findings of the checks, and the checks of packages: missing ones and wrong versions.

At its top this module imports only the standard library, because packages may be missing.
"""

import platform
import re
import threading
import tomllib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Literal, TypeVar

T = TypeVar("T")

_SHOWN = 200  # characters kept at each end; some exceptions quote whole pages
_SECRET = re.compile(r"(://[^/\s:@]*):[^/\s]+@")


@dataclass(frozen=True, slots=True)
class Finding:
    """Line of the report: ok, a note that prevents no run, or a failure.

    The text of a failure says what is wrong, where, and what to do.
    """

    verdict: Literal["ok", "note", "FAIL"]
    text: str


ok, note, fail = (partial(Finding, verdict) for verdict in ("ok", "note", "FAIL"))


def summary(findings: Sequence[Finding]) -> str:
    """Return the last line of a report, which counts its findings."""
    verdicts = [finding.verdict for finding in findings]
    counts = f"{verdicts.count('ok')} ok, {verdicts.count('note')} notes"
    if failed := verdicts.count("FAIL"):
        return f"{failed} failed ({counts}): see the lines that begin with FAIL."
    return f"Nothing failed ({counts})."


def without_password(text: str) -> str:
    """Mask the passwords of URIs such as `https://user:password@host` in a text."""
    return _SECRET.sub(r"\1:***@", text)


def reason(error: BaseException) -> str:
    """Describe an exception, of this process or of a Ray task, in one line without passwords."""
    # Ray's text begins with the stack and ends with the exception
    of_ray = hasattr(error, "cause")
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[-1:] if of_ray else lines) or type(error).__name__
    if lines and not of_ray and not isinstance(error, OSError):
        text = f"{type(error).__name__}: {text}"
    text = without_password(" ".join(text.split()))
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} ... {text[-_SHOWN:]}"


def within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function in a thread, and stop waiting if it takes too long.

    Raises:
        TimeoutError: if it did not end in time; its thread may go on.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([future], timeout=seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s (give more with --timeout)")
    return future.result()


def run_check(check: Callable[[], Iterable[Finding]], *, seconds: float) -> list[Finding]:
    """Run a check; one that raises or hangs becomes a failure."""
    try:
        return within(seconds, lambda: list(check()))
    except Exception as error:
        return [fail(f"The check itself failed: {reason(error)}.")]


# Packages.

PROJECT = "re2tal"
STATED = Path(__file__).parents[2] / "pyproject.toml"
_SET_UP = (
    "Run `make train`, which sets up .venv, or `pip install --editable . --group pipelines` with "
    "pip 25.1 or newer."
)
_LISTED = ("torch", "torchvision", "ray", "mlflow", "optuna", "av", "pyarrow")

Find = Callable[[str], str | None]


def installed(name: str) -> str | None:
    """Return the version of a package by its name in pip; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def requirements(stated: Path = STATED) -> list[str]:
    """List the requirements of the library and of the scripts in a checkout's pyproject.toml."""
    # users of a backbone's library need the extra `backbones`, developers the group `dev`
    whole = tomllib.loads(stated.read_text(encoding="utf-8"))
    return [*whole["project"]["dependencies"], *whole["dependency-groups"]["pipelines"]]


def check_missing(needed: Sequence[str], *, find: Find = installed) -> list[Finding]:
    """Return a failure if packages are missing: then the other checks cannot be imported."""
    missing = [one for one in needed if not find(re.split(r"[^\w.-]", one, maxsplit=1)[0])]
    if not missing:
        return []
    text = f"Not installed: {', '.join(missing)}. {_SET_UP} The other checks need these packages "
    return [fail(f"{text}and were not tried.")]


def check_versions(
    needed: Sequence[str],
    *,
    project: str = PROJECT,
    python: str = platform.python_version(),
    find: Find = installed,
) -> list[Finding]:
    """Compare the versions of Python and of all packages, none of them missing, with the ranges.

    Returns:
        A failure for each version out of range, or one line with the most important versions.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if not installed(project):
        return [fail(f"{project} is not installed in this Python. {_SET_UP}")]
    findings = []
    wanted = metadata(project)["Requires-Python"] or ""
    if not SpecifierSet(wanted).contains(python, prereleases=True):
        text = f"This is Python {python}, but {project} needs {wanted}: rebuild the environment"
        findings.append(fail(f"{text} with `make PYTHON=/path/to/python3`."))
    found = {}
    for one in map(Requirement, needed):
        found[one.name] = there = find(one.name) or "none"
        # nightly builds are accepted: their user chose them
        if not one.specifier.contains(there, prereleases=True):
            text = f"{one.name} {there} is installed, but {project} needs {one.name}{one.specifier}"
            advice = f"run `make train`, or `pip install '{one.name}{one.specifier}'`"
            findings.append(fail(f"{text}: {advice}."))
    shown = ", ".join(f"{name} {found[name]}" for name in _LISTED if name in found)
    text = f"Python {python}, {shown}: all {len(found)} packages are in the ranges of {project}."
    return findings or [ok(text)]
