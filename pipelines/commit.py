"""Which version of the code runs."""

import subprocess
from pathlib import Path


def git_commit(folder: Path) -> str | None:
    """Returns the commit of the checkout, with `-dirty` if files differ from it; None outside git.

    Args:
        folder: inside the checkout.
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
        return None
