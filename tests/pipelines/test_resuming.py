"""Choice of the run that a command goes on with."""

import fcntl
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pyarrow.fs as pafs
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service import client as tracking_client

from pipelines.config.recipe import Recipe
from pipelines.core import underway
from pipelines.core.metric_log import MetricLogger, log_metrics
from pipelines.core.storage import resolve
from pipelines.core.tracking import finishing, start_run
from pipelines.data.plan import Plan
from pipelines.training.checkpoints import complete
from pipelines.training.resuming import asked_to_fit, digest, resume_or_start
from pipelines.training.retention import newest_checkpoint
from pipelines.training.worker import RayRuntime, _logged
from re2tal.errors import UserError

DRIVER = "re2tal.driver"


@pytest.fixture
def recipe(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return replace(tiny_recipe, output=str(tmp_path))


@pytest.fixture(params=["a folder", "an object store"])
def stored(
    request: pytest.FixtureRequest, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Recipe:
    """Recipe whose checkpoints are in a folder or in an object store."""
    if request.param == "a folder":
        return recipe
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return replace(recipe, output=request.getfixturevalue("remote"))


def _checkpoint(recipe: Recipe, run_id: str, scratch: Path) -> str:
    """Put a complete checkpoint into a run's folder, as Ray Train does."""
    whole = scratch / "checkpoint"
    whole.mkdir()
    (whole / "training.pt").write_bytes(b"weights")
    complete(whole, {})
    uri = f"{recipe.output}/{run_id}/checkpoint_1"
    filesystem, path = resolve(uri)
    filesystem.create_dir(path, recursive=True)
    pafs.copy_files(str(whole), path, destination_filesystem=filesystem)
    return uri


def test_the_digest_tells_configurations_and_data_apart(recipe: Recipe, tiny_plan: Plan) -> None:
    same = digest(recipe, tiny_plan)
    assert digest(replace(recipe, resume=False), tiny_plan) == same
    beside = replace(recipe, scale=replace(recipe.scale, validation_workers=2))
    assert digest(beside, tiny_plan) == same
    assert asked_to_fit(beside, "1GiB") == asked_to_fit(recipe, "1GiB")
    for other in (
        replace(recipe, seed=1),
        replace(recipe, optim=replace(recipe.optim, backbone_lr=1.0)),
    ):
        assert digest(other, tiny_plan) != same
    assert digest(recipe, replace(tiny_plan, fingerprint="other")) != same
    fewer = replace(tiny_plan, training=tiny_plan.training[1:])
    assert digest(recipe, fewer) != same


@pytest.mark.slow
def test_a_run_that_did_not_end_is_taken_up_and_one_that_did_is_not(
    stored: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    recipe = stored
    first, goes_on = resume_or_start(recipe, tiny_plan)
    assert not goes_on
    first.client.set_tag(first.run_id, DRIVER, f"{_host()} 99999999 1.00")  # it was killed
    # without a checkpoint there is nothing to go on from
    second, goes_on = resume_or_start(recipe, tiny_plan)
    assert not goes_on
    assert second.run_id != first.run_id
    assert first.client.get_run(first.run_id).info.status == "KILLED"
    checkpoint = _checkpoint(recipe, second.run_id, tmp_path)
    with pytest.raises(OSError, match="full"), finishing(second):
        raise OSError("the disk is full")
    assert second.client.get_run(second.run_id).info.status == "FAILED"
    again, goes_on = resume_or_start(recipe, tiny_plan)
    assert (again, goes_on) == (second, True)
    newest = newest_checkpoint(f"{recipe.output}/{second.run_id}")
    assert newest is not None
    assert newest.uri == checkpoint
    found = again.client.get_run(again.run_id)
    assert found.info.status == "RUNNING"
    assert "error" not in found.data.tags
    other, goes_on = resume_or_start(replace(recipe, resume=False), tiny_plan)
    assert not goes_on
    other, goes_on = resume_or_start(replace(recipe, seed=1), tiny_plan)
    assert not goes_on
    with finishing(again):
        pass
    fresh, goes_on = resume_or_start(recipe, tiny_plan)
    assert not goes_on
    assert fresh.run_id not in {first.run_id, second.run_id, other.run_id}


@pytest.mark.slow
def test_the_last_run_is_taken_up_although_the_clock_was_set_back(
    recipe: Recipe, tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = resume_or_start(recipe, tiny_plan, tags={"sweep.trial": "3"})
    assert first.client.get_run(first.run_id).data.tags["sweep.trial"] == "3"
    with finishing(first):
        pass
    an_hour_ago = int(1000 * (time.time() - 3600))
    monkeypatch.setattr(tracking_client, "get_current_time_millis", lambda: an_hour_ago)
    second, _ = resume_or_start(recipe, tiny_plan)
    times = [run.client.get_run(run.run_id).info.start_time for run in (first, second)]
    assert times == sorted(times, reverse=True)
    _checkpoint(recipe, second.run_id, tmp_path)
    with pytest.raises(OSError, match="full"), finishing(second):
        raise OSError("the disk is full")
    assert resume_or_start(recipe, tiny_plan) == (second, True)


@pytest.mark.slow
def test_a_run_that_goes_on_elsewhere_is_not_taken_up_twice(
    recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    run, _ = resume_or_start(recipe, tiny_plan)
    _checkpoint(recipe, run.run_id, tmp_path)
    parent = psutil.Process().parent()
    assert parent is not None
    alive = f"{_host()} {parent.pid} {parent.create_time():.2f}"
    run.client.set_tag(run.run_id, DRIVER, alive)
    told = rf"process {parent.pid} on {_host()}, since 20.*--no-resume"
    with pytest.raises(UserError, match=told):
        resume_or_start(recipe, tiny_plan)
    # the number was given to another process since
    run.client.set_tag(run.run_id, DRIVER, f"{_host()} {parent.pid} 1.00")
    assert resume_or_start(recipe, tiny_plan) == (run, True)
    # a machine that shares the folder; MLflow shows a run as ended while its model is logged
    underway.end(run.run_id)
    run.client.set_tag(run.run_id, DRIVER, "another 7 1.00")
    run.client.set_terminated(run.run_id)
    note = tmp_path / underway.FOLDER / f"{run.run_id}.json"
    with note.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="under way in process 7 on another"):
            resume_or_start(recipe, tiny_plan)
        assert resume_or_start(replace(recipe, resume=False), tiny_plan)[0] != run
    fresh, goes_on = resume_or_start(recipe, tiny_plan)  # whose process is gone, and that ended
    assert not goes_on
    assert fresh != run


def test_steps_that_are_logged_are_not_logged_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(recipe, output=tmp_path)
    shown: list[float] = []
    posted: list[str] = []
    board = SimpleNamespace(post=SimpleNamespace(remote=posted.append))
    job: Any = SimpleNamespace(run=run, board=board)

    def log(*steps: int) -> None:
        """Log as a worker does from its start to its end; the loss is the step's number."""
        runtime: Any = SimpleNamespace(
            _gauges=SimpleNamespace(set=lambda metrics: shown.append(metrics["train/loss"])),
            _metrics=MetricLogger(run, fallback=tmp_path / "unsent"),
            _logged=_logged(job),
        )
        for step in steps:
            more = {"val/mAP": step / 8} if step % 2 == 0 else {}
            RayRuntime.log(runtime, {"train/loss": float(step), **more}, step=step)
        assert runtime._metrics.close() == 0

    def points(name: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in run.client.get_metric_history(run.run_id, name)]

    log(1, 2, 3)
    # killed in the midst of a request: the fourth step's loss arrived, the evaluation did not
    log_metrics(run, {"train/loss": 4.0}, step=4)
    log(3, 4, 5)
    assert points("train/loss") == [(step, float(step)) for step in (1, 2, 3, 4, 5)]
    assert points("val/mAP") == [(2, 0.25), (4, 0.5)]
    assert shown == [1, 2, 3, 3, 4, 5]

    def silent(_: object) -> NoReturn:
        raise MlflowException("no answer")

    monkeypatch.setattr("pipelines.training.worker.last_steps", silent)
    assert _logged(job) == {}
    assert posted == [
        "warning: MLflow does not say which steps are logged; some may appear twice (no answer)"
    ]


def _host() -> str:
    return socket.gethostname()
