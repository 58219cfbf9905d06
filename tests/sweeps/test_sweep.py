"""A sweep as a user runs it: killed, gone on with, with trials that fail; in MLflow and Optuna."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import psutil
import pytest
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from pipelines.plan import Plan
from pipelines.train import parse
from sweeps.children import FIRST_STEP

ROOT = Path(__file__).parents[2]
TINY = (
    "--base.data.window.frames", "64",
    "--base.model.localizer.width", "16",
    "--base.model.localizer.heads", "2",
    "--base.model.localizer.levels", "3",
    "--base.model.localizer.head-width", "16",
    "--base.batch-size", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def features(tiny_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the tiny videos, which spare the trials the decoding and the backbone."""
    folder = tmp_path_factory.mktemp("features")
    random = np.random.default_rng(0)
    for video_id in tiny_plan.uris:
        np.save(folder / f"{video_id}.npy", random.normal(size=(96, 8)).astype(np.float32))
    said = {"format": "re2tal features 1", "layout": "npy", "resampled": True}
    (folder / "features.json").write_text(json.dumps(said))
    return folder


def _command(tiny_set: Path, features: Path, *more: str) -> tuple[str, ...]:
    return (
        sys.executable, str(Path(__file__).parent / "small.py"), "toy",
        "--base.data.annotations", str(tiny_set / "annotations.json"),
        "--base.data.features", str(features),
        *TINY, "--sampler", "random", "--seed", "1", *more,
    )  # fmt: skip


def _environment(home: Path) -> dict[str, str]:
    dropped = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"HOME": str(home)}


@pytest.fixture(scope="module")
def swept(
    tiny_set: Path, features: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Folder of a sweep that was killed half way, and what it then printed."""
    folder = tmp_path_factory.mktemp("sweep")
    command, env = _command(tiny_set, features, "--concurrency", "2"), _environment(folder)
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as sweep:
        assert sweep.stdout is not None
        printed = []
        for line in sweep.stdout:
            printed.append(line)
            under_way = sum(" starts: " in earlier for earlier in printed) > 2
            if under_way and "(2 of 4)" in "".join(printed):
                left = psutil.Process(sweep.pid).children(recursive=True)
                sweep.kill()
                break
        else:
            raise AssertionError("".join(printed))
    psutil.wait_procs(left, timeout=60)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def _runs(folder: Path) -> tuple[MlflowRun, list[MlflowRun]]:
    """The sweep's run, and those of its trials."""
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 're2tal-sweeps'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    return parent, children


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_tries_again_what_was_under_way(
    swept: tuple[Path, str],
) -> None:
    folder, printed = swept
    assert "going on with the sweep" in printed
    assert "of 4 trials of 1 epochs, 2 at a time" in printed
    parent, _ = _runs(folder)
    storage = f"sqlite:///{folder / 'runs' / parent.info.run_id / 'optuna.db'}"
    study = optuna.load_study(study_name=parent.info.run_id, storage=storage)
    interrupted = study.user_attrs["interrupted"]
    assert interrupted
    ended = [trial for trial in study.trials if trial.number not in interrupted]
    assert [t for t in study.trials if t.state in (TrialState.RUNNING, TrialState.WAITING)] == []
    assert len(ended) == 4
    for number in interrupted:
        again = [trial for trial in ended if trial.params == study.trials[number].params]
        assert len(again) == 1


@pytest.mark.slow
def test_mlflow_has_a_run_for_each_trial_under_the_sweep_s(swept: tuple[Path, str]) -> None:
    folder, printed = swept
    parent, children = _runs(folder)
    assert parent.info.status == "FINISHED"
    metrics = parent.data.metrics
    assert metrics["sweep/trials"] == 4
    assert metrics["sweep/finished"] + metrics["sweep/failed"] == 4
    assert metrics["best/val/mAP"] >= metrics["base/val/mAP"]
    ended = [run for run in children if run.data.tags.get("sweep.outcome") != "interrupted"]
    outcomes = sorted(run.data.tags["sweep.outcome"] for run in ended)
    assert len(ended) == 4
    assert set(outcomes) == {"failed", "finished"}
    for run in ended:
        assert run.data.params["searched.optim.clip"] == run.data.params["optim.clip"]
        assert "searched.optim.localizer_lr" in run.data.params
        assert "train/loss" in run.data.metrics
        failed = run.data.tags["sweep.outcome"] == "failed"
        assert run.info.status == ("FAILED" if failed else "FINISHED")
        if failed:
            assert "not finite" in run.data.tags["error"]
            assert "Traceback" not in run.data.tags["error"]
        else:
            assert "val/mAP" in run.data.metrics
    assert any(FIRST_STEP in run.data.metrics for run in ended)
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"trials.csv", "best.json", "pictures"} <= files
    for needed in ("best trials", "gained", "base", "to the first step", "train the best in full"):
        assert needed in printed


@pytest.mark.slow
def test_the_winner_is_trained_by_the_command_that_is_printed(
    swept: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, printed = swept
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (command,) = re.findall(r"python pipelines/train.py (--from-run .*)", printed)
    recipe = parse(shlex.split(command))
    parent, children = _runs(folder)
    (winner,) = [run for run in children if run.info.run_id == parent.data.tags["best.run"]]
    assert recipe.epochs == 4
    assert recipe.optim.clip == float(winner.data.params["optim.clip"])
    assert recipe.data.annotations == winner.data.params["data.annotations"]
    again = parse([*shlex.split(command), "--optim.clip", "3", "--epochs", "2"])
    assert again == replace(recipe, epochs=2, optim=replace(recipe.optim, clip=3.0))
    with pytest.raises(Exception, match=f"runs:/{'0' * 32}"):
        parse(["--from-run", "0" * 32, "--output", str(folder / "runs")])
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    best = Path(client.download_artifacts(parent.info.run_id, "best.json", str(folder)))
    assert json.loads(best.read_text())["command"].endswith(command)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--concurrency", "50"), "The cluster is too small: 50 trials at a time need"),
        (
            ("--base.scale.workers", "40"),
            "The cluster is too small: 40 workers and the decoding need",
        ),
        (("--base.optim.clip", "5"), "optim.clip of 5.0 is not in the range"),
        (("--trials", "0"), "--trials must be at least 1"),
    ],
)
def test_what_cannot_be_searched_ends_in_one_clear_error(
    tiny_set: Path,
    features: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    message: str,
    ray_instance: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pipelines.train.init_ray", lambda **_: None)  # it runs already
    command = _command(tiny_set, features, *more)[1:]
    monkeypatch.setattr(sys, "argv", [*command])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command[0], run_name="__main__")
    assert ended.value.code not in (None, 0)
    assert message in f"{ended.value.code}{capsys.readouterr().err}".replace("\n", " ")
