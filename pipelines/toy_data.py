"""The toy data sets, made when they are missing.

A script's own pool of processes would have each of them import all that the script has imported, a
matter of ten seconds; so a program that needs little has the pool.
"""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from re2tal.videos.toy import ToyConfig, TrimmedToyConfig


def toy_videos(folder: Path, config: ToyConfig | None = None) -> None:
    """Makes the untrimmed videos and their annotations.

    Args:
        folder: where to; what is there with the same settings stays.
        config: how many.
    """
    _make("videos", folder, config or ToyConfig())


def toy_clips(
    folder: Path, config: TrimmedToyConfig | None = None, *, processes: int | None = None
) -> None:
    """Makes the trimmed clips.

    Args:
        folder: where to; what is there with the same settings stays.
        config: how many.
        processes: that make them; by default one a core.
    """
    _make("clips", folder, config or TrimmedToyConfig(), processes)


def _make(
    kind: str, folder: Path, config: ToyConfig | TrimmedToyConfig, processes: int | None = None
) -> None:
    command = [sys.executable, "-m", "re2tal.videos.toy", kind, str(folder)]
    if processes is not None:
        command += ["--processes", str(processes)]
    for name, value in asdict(config).items():
        values = value if isinstance(value, tuple) else (value,)
        command += [f"--{name}", *map(str, values)]
    subprocess.run(command, check=True)  # noqa: S603 - a module of ours
