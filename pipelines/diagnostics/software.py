"""Whether every node runs the same software as the driver."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from pipelines.diagnostics.finding import Finding, fail, ok
from pipelines.diagnostics.nodes import Answer
from pipelines.diagnostics.versions import installed

CHECK = "software"
CODE = "the project's code"
_PACKAGES = ("ray", "torch", "av")  # PyAV, because frames depend on it
_FOLDERS = ("re2tal", "pipelines")


def software() -> dict[str, str]:
    """What this process would run: name to version, of the project's code a fingerprint."""
    versions = {name: installed(name) or "none" for name in _PACKAGES}
    return {"Python": platform.python_version(), **versions, CODE: fingerprint(_FOLDERS)}


def fingerprint(packages: Sequence[str]) -> str:
    """A few digits that change with any line of the code.

    Args:
        packages: names of packages, each found where Python would import it from.
    """
    digest = hashlib.sha256()
    for name in packages:
        spec = find_spec(name)
        for place in spec.submodule_search_locations or [] if spec else []:
            folder = Path(place)
            for file in sorted(folder.rglob("*.py")):
                digest.update(f"{name}/{file.relative_to(folder).as_posix()}\0".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def check_software(
    here: Mapping[str, str], answers: Sequence[Answer[dict[str, str]]]
) -> list[Finding]:
    """Compares the nodes with the driver.

    Args:
        here: what `software` returned in the driver.
        answers: what it returned on the nodes.
    """
    findings = []
    for answer in answers:
        if answer.value is None:
            text = f"{answer.node.name} cannot run the project: {answer.error}."
            findings.append(fail(CHECK, text))
            continue
        for name, version in here.items():
            if answer.value.get(name) != version:
                findings.append(fail(CHECK, _differs(answer, name, version)))
    if findings:
        return findings
    listed = ", ".join(f"{name} {version}" for name, version in here.items())
    return [ok(CHECK, f"The driver and {_nodes(len(answers))} have the same {listed}.")]


def _differs(answer: Answer[dict[str, str]], name: str, version: str) -> str:
    there = (answer.value or {}).get(name)
    advice = (
        "submit with `ray job submit --working-dir .`, or bring both to the same commit"
        if name == CODE
        else "install the same version on both, from requirements.txt"
    )
    return (
        f"{answer.node.name} has {name} {there}, but the driver {version}: {advice}, and start Ray "
        "there again."
    )


def _nodes(count: int) -> str:
    return "the only node" if count == 1 else f"all {count} nodes"
