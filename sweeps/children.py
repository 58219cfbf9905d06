"""The runs of trials in MLflow: how each ended, and a line for each where the sweep was started."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from ray.tune import Callback
from ray.tune.experiment import Trial

from pipelines.config.recipe import Recipe
from pipelines.core.tracking import Run, log_metrics, start_run
from sweeps.epoch_reports import RUN_ID
from sweeps.sweep import Objective
from sweeps.trial import EPOCH, FINISHED, NUMBER_TAG, OUTCOME_TAG, TrialConfig

FIRST_STEP = "sweep/seconds_to_first_step"


def children(parent: Run) -> list[MlflowRun]:
    """The runs of a sweep's trials, the first first.

    Args:
        parent: the sweep's run.
    """
    client = parent.client
    experiment = client.get_run(parent.run_id).info.experiment_id
    found: list[MlflowRun] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            filter_string=f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.run_id}'",
            run_view_type=ViewType.ACTIVE_ONLY,
            order_by=["attributes.start_time ASC"],
            max_results=1000,
            page_token=token,
        )
        found += page
        token = page.token
        if not token:
            return found


class Outcomes(Callback):
    """Ends the run of each trial in MLflow with what became of it, and prints a line.

    A trial that is pruned is stopped from outside, and one that is killed cannot say so: both would
    stay RUNNING.

    Args:
        parent: the sweep's run.
        base: what a trial trains unless it is told otherwise.
        total: number of trials.
        done: of them before this process.
        objectives: of the sweep.
    """

    def __init__(
        self, parent: Run, base: Recipe, *, total: int, done: int, objectives: Sequence[Objective]
    ) -> None:
        self._parent, self._base, self._objectives = parent, base, objectives
        self._total, self._done = total, done
        self._began: dict[str, float] = {}

    def on_trial_start(self, *, trial: Trial, **_: Any) -> None:
        """Says what a trial is going to try."""
        self._began[trial.trial_id] = time.time()
        config = _config(trial)
        what = "the base recipe" if config.base else _described(config)
        print(f"trial {config.number} starts: {what}", flush=True)

    def on_trial_result(self, *, trial: Trial, result: dict[str, Any], **_: Any) -> None:
        """Says what an epoch reached."""
        if not result.get(FINISHED):
            reached = self._reached(result)
            epoch = f"epoch {result[EPOCH]}/{self._base.epochs}"
            print(f"trial {_config(trial).number}  {epoch}  {reached}", flush=True)

    def on_trial_complete(self, *, trial: Trial, **_: Any) -> None:
        """Marks a trial as finished or, if it did not come to its end, as pruned."""
        result = trial.last_result or {}
        finished = bool(result.get(FINISHED))
        outcome = "finished" if finished else "pruned"
        self._end(self._run_of(trial), trial, "FINISHED" if finished else "KILLED", outcome)
        self._say(trial, f"{outcome}  {self._reached(result)}")

    def on_trial_error(self, *, trial: Trial, **_: Any) -> None:
        """Marks a trial as failed, with the error's text."""
        run = self._run_of(trial)
        # most trials said so themselves; one whose process was killed could not
        error = run.client.get_run(run.run_id).data.tags.get("error") or _last_words(trial)
        run.client.set_tag(run.run_id, "error", error)
        self._end(run, trial, "FAILED", "failed")
        self._say(trial, f"failed: {error.splitlines()[0]}")

    def _end(self, run: Run, trial: Trial, status: str, outcome: str) -> None:
        client = run.client
        client.set_tag(run.run_id, OUTCOME_TAG, outcome)
        client.set_terminated(run.run_id, status)
        steps = client.get_metric_history(run.run_id, "train/loss")
        began = self._began.get(trial.trial_id)
        if steps and began is not None:
            first = min(m.timestamp for m in steps) / 1000 - began
            if first > 0:  # else the trial went on where a killed sweep had come to
                log_metrics(run, {FIRST_STEP: first}, step=0)

    def _run_of(self, trial: Trial) -> Run:
        """The trial's run; made now, if the trial ended before it made one."""
        number = str(_config(trial).number)
        reported = (trial.last_result or {}).get(RUN_ID)
        if reported:
            return Run(uri=self._parent.uri, run_id=reported)
        for run in children(self._parent):
            if run.data.tags.get(NUMBER_TAG) == number:
                return Run(uri=self._parent.uri, run_id=run.info.run_id)
        tags = {MLFLOW_PARENT_RUN_ID: self._parent.run_id, NUMBER_TAG: number}
        return start_run(self._base, output=self._base.output, tags=tags)

    def _say(self, trial: Trial, what: str) -> None:
        self._done += 1
        print(f"trial {_config(trial).number}  {what}  ({self._done} of {self._total})", flush=True)

    def _reached(self, result: dict[str, Any]) -> str:
        return "  ".join(
            f"{objective.title} {result[objective.metric]:.3f}"
            for objective in self._objectives
            if not math.isnan(result.get(objective.metric, math.nan))
        )


def _config(trial: Trial) -> TrialConfig:
    config: TrialConfig = trial.config["trial"]
    return config


def _described(config: TrialConfig) -> str:
    return "  ".join(assignment(name, value) for name, value in config.point.items())


def assignment(name: str, value: Any) -> str:
    """A parameter and its value, in few digits.

    Args:
        name: of the parameter.
        value: of it.
    """
    return f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"


def _last_words(trial: Trial) -> str:
    """The end of what Ray Tune kept of a failure."""
    path = trial.error_file
    if path is None or not Path(path).exists():
        return "the trial's process ended without a message"
    lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
    return "\n".join(lines[-1:] + lines[-20:-1])[:5000]
