"""`reproduce.py --quick` as a script, and the same command without Ray."""

import re
import sys
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from tests.pipelines.ray_head import ROOT, environment, run_command

pytestmark = [pytest.mark.slow, pytest.mark.long]
EXPERIMENTS = ("memory", "accuracy", "tal", "exactness", "speed")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder in which the script ran, and what it printed."""
    folder = tmp_path_factory.mktemp("reproduce")
    script = str(ROOT / "pipelines" / "reproduce.py")
    return folder, run_command(
        sys.executable, script, "--quick", cwd=folder, env=environment(folder)
    )


def _runs(folder: Path) -> tuple[Run, list[Run]]:
    """MLflow run of all experiments, and its child runs."""
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 're2tal-reproduce'")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    return parent, children


def test_the_report_has_all_experiments(quick: tuple[Path, str]) -> None:
    folder, printed = quick
    report = folder / "runs" / "reproduction-quick" / "report.md"
    text = report.read_text()
    assert len(re.findall("^## ", text, re.MULTILINE)) == len(EXPERIMENTS)
    assert "It is not complete" not in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(pictures) >= len(EXPERIMENTS)
    assert all((report.parent / picture).is_file() for picture in pictures)
    for claim in re.findall(
        r"^\| (.*?) \| (?:holds|does not hold|cannot be told) \|", text, re.MULTILINE
    ):
        assert claim in printed
    assert "reproduce.py --quick" in text
    assert f"results: {report.relative_to(folder)}" in printed


def test_each_piece_of_work_is_a_run_below_that_of_all(quick: tuple[Path, str]) -> None:
    parent, children = _runs(quick[0])
    assert parent.info.status == "FINISHED"
    assert {child.info.status for child in children} == {"FINISHED"}
    assert {child.data.tags["kind"] for child in children} == set(EXPERIMENTS)
    client = MlflowClient(f"sqlite:///{quick[0] / 'runs' / 'mlflow.db'}")
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert "report.md" in artifacts
    assert any(name.endswith(".png") for name in artifacts)
    (finetuned,) = [
        child for child in children if child.data.params.get("kind") == "scratch"
        and child.data.params["seed"] == "0"
    ]  # fmt: skip
    assert 0 <= finetuned.data.metrics["top1"] <= 1


def test_without_ray_it_takes_up_what_is_there(quick: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = quick
    for name in ("ray", "mlflow"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('there is none here')\n")
    env = environment(folder) | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    printed = run_command(
        sys.executable, "-m", "pipelines.experiments", "paper", "--quick", cwd=folder, env=env
    )
    done, jobs = re.search(r"(\d+) of (\d+) jobs were done before", printed).groups()  # type: ignore[union-attr]
    assert done == jobs
    assert int(jobs) == len(_runs(folder)[1])
