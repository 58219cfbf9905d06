"""Scripts: unique names, and the code of their own checkout."""

import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from pipelines import detect, evaluate, probe, train

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", [detect, evaluate, probe, train])
def test_results_lie_under_runs_which_git_ignores(script: Any) -> None:
    """A script that is started in a checkout leaves no file that git would add."""
    config = script.parse(["toy"] if script is train else [])
    assert Path(config.output).parts[0] == "runs"
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/runs/" in ignored


@pytest.mark.parametrize("folder", ["pipelines", "sweeps"])
def test_no_script_hides_a_module_of_python_or_of_a_dependency(folder: str) -> None:
    """A script's folder comes first on the import path, so its modules must not hide others."""
    names = {path.stem for path in (ROOT / folder).iterdir() if path.suffix in ("", ".py")}
    assert "train" in names or folder == "sweeps"
    others = {name for name, owners in packages_distributions().items() if owners != ["re2tal"]}
    assert not names & (sys.stdlib_module_names | others)


@pytest.mark.parametrize("folder", ["pipelines", "sweeps"])
def test_a_script_refuses_the_code_of_another_checkout(folder: str, tmp_path: Path) -> None:
    for name in ("re2tal", folder):
        (tmp_path / name).mkdir()
    script = tmp_path / folder / "script.py"
    script.write_text("import pipelines\nprint('ran')\n")
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"{script} would run the code of another checkout, {ROOT}" in done.stderr
