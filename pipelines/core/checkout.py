"""Commit of the running checkout, and a fingerprint of its code."""

import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
COMMIT = "RE2TAL_GIT_COMMIT"
"""Environment variable with the commit of a Ray job's code, which Ray uploads without `.git`."""


def git_commit(folder: Path) -> str | None:
    """Return a checkout's commit, with `-dirty` if files differ from it.

    Outside git, return the value of `RE2TAL_GIT_COMMIT`, or None.
    """
    command = [
        "git",
        "-C",
        str(folder),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT)


def script_command(script: str) -> list[str]:
    """Return the command that runs a script of this checkout from the working directory.

    Args:
        script: path of the script in the checkout, such as `pipelines/train.py`.
    """
    here = Path.cwd()
    words = (Path(sys.executable), _ROOT / script)
    return [str(w.relative_to(here) if w.is_relative_to(here) else w) for w in words]


def this_command() -> str:
    """Return the command line that does again what this process does, in its working directory."""
    name = sys.argv[0]
    python = [script_command(name)[0]] if name.endswith(".py") else []
    return shlex.join([*python, *sys.argv])


def code_fingerprint() -> str:
    """Hash all code that a result may depend on."""
    digest = hashlib.sha256()
    for package in ("re2tal", "pipelines"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(str(path.relative_to(_ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
