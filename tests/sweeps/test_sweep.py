"""A sweep as a user runs it: with trials that fail, killed and gone on with; in MLflow, Optuna."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optuna
import psutil
import pytest
import sqlalchemy
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState
from sqlalchemy.engine import make_url

from pipelines.data.plan import Plan
from pipelines.train import parse
from sweeps.trial import FIRST_STEP
from tests.cluster.mlflow_server import running_server
from tests.cluster.postgres import binaries
from tests.pipelines.ray_head import environment
from tests.pipelines.scripts import run_here

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
        *TINY, "--sampler", "random", "--seed", "1",
        "--constraint", "host_memory <= 64GiB", "--constraint", "time <= 2h", *more,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Swept:
    """A sweep that has ended.

    Attributes:
        printed: by the command that ended it.
        output: its folder of runs.
        storage: of Optuna.
        login: variables with which MLflow's server lets one in.
    """

    printed: str
    output: Path
    storage: str
    login: dict[str, str]

    @property
    def client(self) -> MlflowClient:
        """Of the store; the variables must be set."""
        return MlflowClient(self.login["MLFLOW_TRACKING_URI"])


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], str]]:
    """A team's MLflow server, and a schema for Optuna in its data base; else local files."""
    folder = tmp_path_factory.mktemp("team")
    if binaries() is None:
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        yield {"MLFLOW_TRACKING_URI": uri}, f"sqlite:///{folder / 'optuna.db'}"
        return
    with running_server(folder / "mlflow") as server:
        engine = sqlalchemy.create_engine(server.database)
        with engine.begin() as connection:
            connection.execute(sqlalchemy.schema.CreateSchema("optuna"))
        engine.dispose()
        yield server.login("ann"), f"{server.database}?options=-csearch_path%3Doptuna"


@pytest.fixture(scope="module")
def swept(
    tiny_set: Path,
    features: Path,
    tmp_path_factory: pytest.TempPathFactory,
    ray_instance: None,
) -> Swept:
    """A sweep of two trials, of which one fails, with local files."""
    folder = tmp_path_factory.mktemp("swept")
    command = _command(tiny_set, features, "--trials", "2")
    printed = run_here(Path(command[1]), *command[2:], folder=folder)
    output = folder / "runs"
    (storage,) = output.glob("*/optuna.db")
    uri = f"sqlite:///{output / 'mlflow.db'}"
    return Swept(printed, output, f"sqlite:///{storage}", {"MLFLOW_TRACKING_URI": uri})


@pytest.fixture(scope="module")
def killed(
    tiny_set: Path,
    features: Path,
    team: tuple[dict[str, str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Swept:
    """A sweep whose two trials at a time log to the server, which is killed half way."""
    folder = tmp_path_factory.mktemp("sweep")
    login, storage = team
    more = ("--trials", "3", "--concurrency", "2", "--storage", storage)
    command = _command(tiny_set, features, *more)
    env = environment(folder) | login
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as sweep:
        assert sweep.stdout is not None
        printed = []
        for line in sweep.stdout:
            printed.append(line)
            under_way = sum(" starts: " in earlier for earlier in printed) > 2
            if under_way and "(1 of 3)" in "".join(printed):
                left = psutil.Process(sweep.pid).children(recursive=True)
                sweep.kill()
                break
        else:
            raise AssertionError("".join(printed))
    psutil.wait_procs(left, timeout=60)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return Swept(done.stdout, folder / "runs", storage, login)


def _runs(swept: Swept) -> tuple[MlflowRun, list[MlflowRun]]:
    """The sweep's run, and those of its trials."""
    client = swept.client
    (experiment,) = client.search_experiments(filter_string="name = 're2tal-sweeps'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    return parent, children


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_sweep_goes_on_and_tries_again_what_was_under_way(
    killed: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in killed.login.items():
        monkeypatch.setenv(name, value)
    assert "continuing the sweep" in killed.printed
    assert "of 3 trials of 1 epoch, 2 at a time" in killed.printed
    _check_runs(killed, trials=3)
    parent, _ = _runs(killed)
    study = optuna.load_study(study_name=parent.info.run_id, storage=killed.storage)
    interrupted = study.user_attrs["interrupted"]
    assert interrupted
    ended = [trial for trial in study.trials if trial.number not in interrupted]
    assert [t for t in study.trials if t.state in (TrialState.RUNNING, TrialState.WAITING)] == []
    assert len(ended) == 3
    for number in interrupted:
        again = [trial for trial in ended if trial.params == study.trials[number].params]
        assert len(again) == 1


@pytest.mark.slow
def test_mlflow_has_a_run_for_each_trial_under_the_sweep_s(swept: Swept) -> None:
    _check_runs(swept, trials=2)


def _check_runs(swept: Swept, *, trials: int) -> None:
    parent, children = _runs(swept)
    assert parent.info.status == "FINISHED"
    metrics = parent.data.metrics
    assert metrics["sweep/trials"] == trials
    assert metrics["sweep/finished"] + metrics["sweep/failed"] == trials
    assert metrics["best/val/mAP"] >= metrics["base/val/mAP"]
    ended = [run for run in children if run.data.tags.get("sweep.outcome") != "interrupted"]
    outcomes = sorted(run.data.tags["sweep.outcome"] for run in ended)
    assert len(ended) == trials
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
    scores = [float(run.data.tags["best.mAP"]) for run in ended if run.info.status == "FINISHED"]
    assert metrics["best/val/mAP"] == max(scores)
    assert any(FIRST_STEP in run.data.metrics for run in ended)
    files = {file.path for file in swept.client.list_artifacts(parent.info.run_id)}
    assert {"trials.csv", "best.json", "pictures"} <= files
    for needed in ("best trials", "gained", "base", "to the first step", "train the best in full"):
        assert needed in swept.printed
    # columns of what has a constraint
    assert re.search(r"host_memory, MB.+time, s", swept.printed)
    shown = make_url(swept.storage).render_as_string(hide_password=True)
    assert f"optuna-dashboard {shlex.quote(shown)}" in swept.printed
    (study,) = optuna.get_all_study_summaries(swept.storage)
    kept = optuna.load_study(study_name=study.study_name, storage=swept.storage).best_trial
    assert set(kept.constraints) == {"host_memory <= 64GiB", "time <= 2h"}
    assert max(kept.constraints.values()) < 0
    assert kept.user_attrs["measured"]["host_memory"] > 100


@pytest.mark.slow
def test_the_winner_is_trained_by_the_command_that_is_printed(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", swept.login["MLFLOW_TRACKING_URI"])
    (command,) = re.findall(r"/pipelines/train.py (--from-run .*)", swept.printed)
    recipe = parse(shlex.split(command))
    parent, children = _runs(swept)
    (winner,) = [run for run in children if run.info.run_id == parent.data.tags["best.run"]]
    assert recipe.epochs == 4
    assert recipe.optim.clip == float(winner.data.params["optim.clip"])
    assert recipe.data.annotations == winner.data.params["data.annotations"]
    again = parse([*shlex.split(command), "--optim.clip", "3", "--epochs", "2"])
    assert again == replace(recipe, epochs=2, optim=replace(recipe.optim, clip=3.0))
    with pytest.raises(Exception, match=f"runs:/{'0' * 32}"):
        parse(["--from-run", "0" * 32, "--output", str(swept.output)])
    best = Path(swept.client.download_artifacts(parent.info.run_id, "best.json", str(tmp_path)))
    chosen = json.loads(best.read_text())
    assert chosen["command"].endswith(command)
    assert chosen["score"] == {"val/mAP": float(winner.data.tags["best.mAP"])}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--concurrency", "50"), "The cluster is too small: 50 trials at a time need"),
        (
            ("--base.scale.workers", "40"),
            "The cluster is too small: 40 workers and the decoding need",
        ),
        (("--base.optim.clip", "5"), "optim.clip of 5.0 is not in the search range"),
        (("--trials", "0"), "--trials must be at least 1"),
        (("--base.scale.validation-workers", "1"), "--base.scale.validation-workers must be 0"),
        (("--constraint", "memory <= 1GiB"), "without GPUs do not measure it"),
        (("--constraint", "x <= 1"), "trials have no measure 'x'"),
        (("--sampler", "auto"), "--sampler auto needs optunahub"),
        (("--warm-start", "nothing"), "--warm-start nothing: there is neither"),
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
    command = _command(tiny_set, features, *more)[1:]
    monkeypatch.setattr(sys, "argv", [*command])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command[0], run_name="__main__")
    assert ended.value.code not in (None, 0)
    assert message in f"{ended.value.code}{capsys.readouterr().err}".replace("\n", " ")
