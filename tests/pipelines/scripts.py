"""Runner of scripts in the tests' own process, which has their imports and may have a Ray."""

import io
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest


def run_here(
    script: Path, *arguments: str, folder: Path, printed: io.StringIO | None = None
) -> str:
    """Run a script as its command line does.

    Args:
        script: path of the file.
        arguments: arguments of the command line.
        folder: working folder.
        printed: stream that receives its output; by default a new one.

    Returns:
        The output.
    """
    printed = printed or io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")
    return printed.getvalue()
