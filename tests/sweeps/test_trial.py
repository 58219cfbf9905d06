"""How trials end in MLflow, whoever ended them."""

import fcntl
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from ray.tune.experiment import Trial

from pipelines.config.recipe import Recipe
from pipelines.config.recipes import toy
from pipelines.core import underway
from pipelines.core.metric_log import log_metrics
from pipelines.core.metric_names import BEST_MAP, EPOCH, MAP, MEMORY
from pipelines.core.storage import database_url
from pipelines.core.tracking import Run, finishing, start_run
from re2tal.errors import UserError
from sweeps.driver import end_children, is_through
from sweeps.epoch_reports import RUN_ID
from sweeps.finetune import SWEEP
from sweeps.report import report
from sweeps.study import open_study
from sweeps.sweep import HIGHEST_MAP, SweepConfig
from sweeps.trial import (
    FINISHED,
    FIRST_STEP,
    Outcomes,
    TrialConfig,
    children,
    peak_memory,
    score_of,
)


class _Sweep:
    """A sweep's run, and what watches over its trials."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.parent = start_run(recipe, output=Path(recipe.output))
        self.outcomes = Outcomes(self.parent, recipe, total=3, done=0, objectives=(HIGHEST_MAP,))

    def started(self, number: int) -> Trial:
        config = TrialConfig(number=number, values={}, point={"optim.clip": 0.7}, base=False)
        trial = Trial("train", config={"trial": config}, stub=True)
        self.outcomes.on_trial_start(trial=trial)
        return trial

    def run_of(self, number: int) -> Run:
        """What the trial itself starts."""
        tags = {"mlflow.parentRunId": self.parent.run_id, "sweep.trial": str(number)}
        return start_run(self.recipe, output=Path(self.recipe.output), tags=tags)

    def child(self) -> MlflowRun:
        (child,) = children(self.parent)
        return child


@pytest.fixture
def sweep(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Sweep:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return _Sweep(replace(tiny_recipe, output=str(tmp_path)))


def _result(run: Run, **more: Any) -> dict[str, Any]:
    return {MAP: 0.25, EPOCH: 1, RUN_ID: run.run_id, **more}


def test_a_trial_that_is_stopped_was_pruned(
    sweep: _Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    trial, run = sweep.started(1), sweep.run_of(1)
    log_metrics(run, {"train/loss": 1.0}, step=1)
    sweep.outcomes.on_trial_result(trial=trial, result=_result(run))
    trial.update_last_result(_result(run))
    sweep.outcomes.on_trial_complete(trial=trial)
    child = sweep.child()
    assert (child.info.status, child.data.tags["sweep.outcome"]) == ("KILLED", "pruned")
    assert 0 < child.data.metrics[FIRST_STEP] < 60
    printed = capsys.readouterr().out
    assert "trial 1 starts: optim.clip=0.7" in printed
    assert "trial 1  epoch 1/1  average mAP 0.250" in printed
    assert "trial 1  pruned  average mAP 0.250  (1 of 3)" in printed


def test_a_trial_is_told_by_its_best_epoch_however_it_ends(
    sweep: _Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped, ended = sweep.started(1), sweep.started(2)
    for trial in (stopped, ended):
        run = sweep.run_of(int(trial.config["trial"].number))
        log_metrics(run, {"val/mAP": 0.75}, step=1)
        run.client.set_tag(run.run_id, BEST_MAP, "0.75")
        log_metrics(run, {"val/mAP": 0.5}, step=2)
        for epoch, value in ((1, 0.75), (2, 0.5)):
            result = {**_result(run), MAP: value, EPOCH: epoch}
            sweep.outcomes.on_trial_result(trial=trial, result=result)
            trial.update_last_result(result)
    trial.update_last_result({**_result(run), **score_of(run), FINISHED: True})
    sweep.outcomes.on_trial_complete(trial=stopped)
    sweep.outcomes.on_trial_complete(trial=ended)
    printed = capsys.readouterr().out
    assert "trial 1  epoch 2/1  average mAP 0.500" in printed
    assert "trial 1  pruned  average mAP 0.750" in printed
    assert "trial 2  finished  average mAP 0.750" in printed


def test_a_trial_that_reports_its_end_is_finished(sweep: _Sweep) -> None:
    trial, run = sweep.started(1), sweep.run_of(1)
    trial.update_last_result(_result(run, **{FINISHED: True}))
    sweep.outcomes.on_trial_complete(trial=trial)
    child = sweep.child()
    assert (child.info.status, child.data.tags["sweep.outcome"]) == ("FINISHED", "finished")


def test_a_trial_that_fails_has_said_why(
    sweep: _Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial, run = sweep.started(2), sweep.run_of(2)
    trial.storage = _Storage(str(tmp_path))
    run.client.set_tag(run.run_id, "error", "UserError: the loss is not finite")
    sweep.outcomes.on_trial_error(trial=trial)
    child = sweep.child()
    assert (child.info.status, child.data.tags["sweep.outcome"]) == ("FAILED", "failed")
    assert child.data.tags["error"] == "UserError: the loss is not finite"
    assert "trial 2  failed: UserError: the loss" in capsys.readouterr().out


def test_a_trial_that_fails_before_it_made_a_run_gets_one(
    sweep: _Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = sweep.started(2)
    kept = tmp_path / "error.txt"
    kept.write_text("Traceback\n  File 1\nValueError: a width of 5 cannot be cut\n\n")
    trial.run_metadata.error_filename = kept.name
    trial.storage = _Storage(str(tmp_path))
    sweep.outcomes.on_trial_error(trial=trial)
    child = sweep.child()
    assert (child.info.status, child.data.tags["sweep.outcome"]) == ("FAILED", "failed")
    assert child.data.tags["error"].startswith("ValueError: a width of 5 cannot be cut\nTraceback")
    assert child.data.tags["sweep.trial"] == "2"
    assert "trial 2  failed: ValueError: a width of 5 cannot be cut  (1 of 3)" in (
        capsys.readouterr().out
    )


def test_a_trial_whose_process_was_killed_is_not_left_running(
    sweep: _Sweep, tmp_path: Path
) -> None:
    trial = sweep.started(2)
    sweep.run_of(2)
    trial.storage = _Storage(str(tmp_path))
    sweep.outcomes.on_trial_error(trial=trial)
    child = sweep.child()
    assert child.info.status == "FAILED"
    assert "without a message" in child.data.tags["error"]


@pytest.fixture
def study(sweep: _Sweep, tmp_path: Path) -> optuna.Study:
    """The sweep's study: a trial each that came to its end, was pruned, failed, was interrupted."""
    base = replace(toy(), output=str(tmp_path))
    config = SweepConfig(name="small", epochs=1, output=str(tmp_path), base=base)

    def opened() -> optuna.Study:
        return open_study(
            SWEEP,
            config,
            storage=RDBStorage(database_url(tmp_path / "optuna.db")),
            name=sweep.parent.run_id,
            base_point={"optim.clip": 1.0},
        )

    study = opened()
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
        value = 0.5 if state == TrialState.COMPLETE else None
        study.tell(study.ask(), value, state=state)
    study.ask()
    return opened()


def test_what_a_killed_sweep_left_running_is_ended_as_optuna_knows_it(
    sweep: _Sweep, study: optuna.Study, tmp_path: Path
) -> None:
    runs = [sweep.run_of(number) for number in range(4)]
    told = sweep.run_of(1)  # was killed between the outcome and the status
    told.client.set_tag(told.run_id, "sweep.outcome", "pruned")
    tags = {"mlflow.parentRunId": sweep.parent.run_id}
    postprocessing = start_run(sweep.recipe, output=tmp_path, tags=tags)
    before = sweep.run_of(3)
    before.client.set_tag(before.run_id, "sweep.outcome", "interrupted")
    before.client.set_terminated(before.run_id, "KILLED")
    lost = sweep.run_of(3)  # saw Ray end
    with pytest.raises(OSError, match="died"), finishing(lost):
        raise OSError("the actor died")
    end_children(sweep.parent, study, output=str(tmp_path))
    assert "error" not in lost.client.get_run(lost.run_id).data.tags
    found = {child.info.run_id: child for child in children(sweep.parent)}
    outcomes = {
        run_id: (child.info.status, child.data.tags.get("sweep.outcome"))
        for run_id, child in found.items()
    }
    assert [outcomes[run.run_id] for run in runs] == [
        ("FINISHED", "finished"),
        ("KILLED", "pruned"),
        ("FAILED", "failed"),
        ("KILLED", "interrupted"),
    ]
    assert outcomes[told.run_id] == ("KILLED", "pruned")
    assert outcomes[lost.run_id] == ("KILLED", "interrupted")
    assert outcomes[postprocessing.run_id] == ("KILLED", None)
    assert outcomes[before.run_id] == ("KILLED", "interrupted")
    assert sweep.parent.client.get_run(sweep.parent.run_id).info.status == "RUNNING"
    assert underway.left_behind(tmp_path) == {}
    # the process of a trial ends a little later than the sweep's
    late = sweep.run_of(3)
    underway.end(late.run_id)
    note = tmp_path / underway.FOLDER / f"{late.run_id}.json"
    with note.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.5, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        end_children(sweep.parent, study, output=str(tmp_path))
        assert not note.exists()
    assert late.client.get_run(late.run_id).info.status == "KILLED"


def test_a_sweep_of_which_no_trial_came_to_its_end_fails_with_the_first_reason(
    sweep: _Sweep, study: optuna.Study, tmp_path: Path
) -> None:
    config = SweepConfig(
        name="small", experiment=sweep.recipe.experiment, epochs=1, trials=3, base=sweep.recipe
    )
    run = sweep.run_of(0)
    run.client.set_tag(run.run_id, "error", "UserError: the loss is not finite\nmore")
    fruitless = optuna.create_study(study_name="fruitless")
    for state in (TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL):
        fruitless.tell(fruitless.ask(), state=state)
    told = r"0 finished, 1 pruned, 2 failed. The first error: UserError: the loss is not"
    with pytest.raises(UserError, match=told), finishing(sweep.parent):
        report(SWEEP, config, sweep.parent, fruitless)
    assert sweep.parent.client.get_run(sweep.parent.run_id).info.status == "FAILED"
    assert is_through(sweep.parent, config)
    assert not is_through(sweep.parent, replace(config, trials=4))


def test_a_tracker_that_fails_ends_no_sweep_and_hides_no_outcome(
    sweep: _Sweep,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MlflowException("database or disk is full\nmuch more")

    failed, pruned = sweep.started(1), sweep.started(2)
    run = sweep.run_of(2)
    failed.storage = _Storage(str(tmp_path))
    pruned.update_last_result(_result(run))
    monkeypatch.setattr(MlflowClient, "set_tag", fail)
    monkeypatch.setattr(MlflowClient, "search_runs", fail)
    sweep.outcomes.on_trial_error(trial=failed)
    sweep.outcomes.on_trial_complete(trial=pruned)
    printed = capsys.readouterr()
    assert "trial 1  failed: the trial's process ended without a message" in printed.out
    assert "trial 2  pruned  average mAP 0.250" in printed.out
    for number in (1, 2):
        told = f"warning: MLflow could not record the outcome of trial {number} (database or disk"
        assert told in printed.err


def test_a_trial_is_judged_by_its_gpu_s_peak_or_else_by_what_was_predicted(sweep: _Sweep) -> None:
    run = sweep.run_of(1)
    assert peak_memory(run) == {}
    log_metrics(run, {"memory/predicted_activations_mb": 65.0}, step=0)
    assert peak_memory(run) == {MEMORY: 65.0}
    for step, value in enumerate((300.0, 500.0, 400.0)):
        log_metrics(run, {"memory/cuda_peak_mb": value}, step=step)
    assert peak_memory(run) == {MEMORY: 500.0}


class _Storage:
    """Where Ray Tune keeps what belongs to a trial."""

    def __init__(self, folder: str) -> None:
        self.trial_driver_staging_path = folder
