"""Trials that Ray Tune starts: each trains as `train.py` does, and logs its outcome to MLflow."""

import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlflow.entities import Param, ViewType
from mlflow.entities import Run as MlflowRun
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial

from pipelines.config.recipe import Recipe
from pipelines.core.cluster import quiet_data
from pipelines.core.metric_log import log_metrics
from pipelines.core.metric_names import BEST_MAP, EPOCH, MAP, MEMORY
from pipelines.core.tracking import Run, start_run
from pipelines.core.underway import forget
from pipelines.training.resuming import resume_or_start
from pipelines.training.run import Prepared, train_run
from sweeps.constraints import HOST_MEMORY, SPEED
from sweeps.epoch_reports import RUN_ID, EpochReports
from sweeps.suggestions import override
from sweeps.sweep import Objective

NUMBER_TAG = "sweep.trial"
OUTCOME_TAG = "sweep.outcome"
SEARCHED = "searched."  # prefix of searched parameters, which are logged in addition to all others

FINISHED = "finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialConfig:
    """Configuration of a trial.

    Attributes:
        number: number of the Optuna trial.
        values: values for fields of the recipe, by dotted name.
        point: Optuna's proposals, as primitive values by name.
        base: true for the trial of the base recipe.
    """

    number: int
    values: dict[str, Any]
    point: dict[str, Any]
    base: bool


def run_trial(config: Mapping[str, Any], *, ready: Prepared, parent: str, threads: int) -> None:
    """Train a trial that Ray Tune starts.

    Args:
        config: dictionary from Ray Tune, with a `TrialConfig` under "trial".
        ready: base recipe, and the videos of all trials.
        parent: id of the sweep's run in MLflow.
        threads: number of PyTorch's threads in a worker.
    """
    quiet_data()
    trial: TrialConfig = config["trial"]
    ready = replace(ready, recipe=override(ready.recipe, trial.values))
    # from the start: even a run whose process is killed at once must be recognised as this trial's
    tags = {NUMBER_TAG: str(trial.number)}
    run, _ = resume_or_start(ready.recipe, ready.plan, parent=parent, tags=tags)
    _name(run, trial, ready.recipe.name)
    train_run(ready, run, callbacks=[EpochReports(run.run_id)], threads=threads)
    memory = peak_memory(run)
    log_metrics(run, memory, step=0)
    # reported even if all epochs were finished before this trial was restarted
    ended = {EPOCH: ready.recipe.epochs, FINISHED: True}
    tune.report({**score_of(run), **memory, **costs(run), **ended})


def _name(run: Run, trial: TrialConfig, recipe: str) -> None:
    client = run.client
    client.set_tag(run.run_id, NUMBER_TAG, trial.number)
    what = "base" if trial.base else f"trial {trial.number}"
    client.set_tag(run.run_id, MLFLOW_RUN_NAME, f"{recipe} {what}")
    log_searched(run, trial.point)


def log_searched(run: Run, point: Mapping[str, Any]) -> None:
    """Log the values proposed for a run, in addition to the parameters that all runs have."""
    params = [Param(f"{SEARCHED}{name}", str(value)) for name, value in point.items()]
    run.client.log_batch(run.run_id, params=params)


def score_of(run: Run) -> dict[str, Any]:
    """Return the score of a finished trial, by which trials are compared.

    It is the mAP of the best checkpoint, which becomes the trial's model and supplies the
    detections for a search of post-processing.
    """
    tags = run.client.get_run(run.run_id).data.tags
    return {MAP: float(tags[BEST_MAP]), RUN_ID: run.run_id}


def peak_memory(run: Run) -> dict[str, float]:
    """Return a finished trial's memory metric, in MB.

    It is the measured peak of a GPU or, without one, the predicted peak of the activations of a
    worker's step. A run on features without a GPU has none.
    """
    for name in ("memory/cuda_peak_mb", "memory/predicted_activations_mb"):
        values = [m.value for m in run.client.get_metric_history(run.run_id, name)]
        if values:
            return {MEMORY: max(values)}
    return {}


def costs(run: Run) -> dict[str, float]:
    """Return the other metrics that constraints may bound: host memory and speed."""
    found = {}
    for name, of in ((HOST_MEMORY, max), (SPEED, statistics.median)):
        values = [m.value for m in run.client.get_metric_history(run.run_id, name)]
        if values:
            found[name] = of(values)
    return found


FIRST_STEP = "sweep/seconds_to_first_step"


def children(parent: Run) -> list[MlflowRun]:
    """List the runs of a sweep's trials by their start times."""
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
    """Callback that ends each trial's MLflow run with its outcome, and prints a line.

    A trial that is pruned or killed is stopped from outside: its run would stay RUNNING.

    Args:
        parent: the sweep's run.
        base: recipe of the trial that trains the base recipe.
        total: number of trials.
        done: number of trials that ended before this process started.
        objectives: objectives of the sweep.
    """

    def __init__(
        self, parent: Run, base: Recipe, *, total: int, done: int, objectives: Sequence[Objective]
    ) -> None:
        self._parent, self._base, self._objectives = parent, base, objectives
        self._total, self._done = total, done
        self._began: dict[str, float] = {}
        self._best: dict[str, dict[str, Any]] = {}  # each trial's best epoch by the first objective

    def on_trial_start(self, *, trial: Trial, **_: Any) -> None:
        """Print the parameters of a trial that starts."""
        self._began[trial.trial_id] = time.time()
        config = _config(trial)
        what = "the base recipe" if config.base else _described(config)
        print(f"trial {config.number} starts: {what}", flush=True)

    def on_trial_result(self, *, trial: Trial, result: dict[str, Any], **_: Any) -> None:
        """Print the objectives' values after an epoch."""
        if not result.get(FINISHED):
            self._keep_best(trial, result)
            reached = self._reached(result)
            epoch = f"epoch {result[EPOCH]}/{self._base.epochs}"
            print(f"trial {_config(trial).number}  {epoch}  {reached}", flush=True)

    def on_trial_complete(self, *, trial: Trial, **_: Any) -> None:
        """Mark a trial as finished or, without a final report, as pruned."""
        result = trial.last_result or {}
        finished = bool(result.get(FINISHED))
        outcome = "finished" if finished else "pruned"
        with _warned(trial):
            self._end(self._run_of(trial), trial, "FINISHED" if finished else "KILLED", outcome)
        if not finished:
            self._keep_best(trial, result)
        best = result if finished else self._best[trial.trial_id]
        self._say(trial, f"{outcome}  {self._reached(best)}")

    def _keep_best(self, trial: Trial, result: dict[str, Any]) -> None:
        """Keep a trial's best epoch, by which stopped trials are reported like finished ones."""
        first = self._objectives[0]
        sign = 1.0 if first.mode == "max" else -1.0
        kept = self._best.setdefault(trial.trial_id, result)
        value, best = (one.get(first.metric, math.nan) for one in (result, kept))
        if math.isnan(best) or sign * value > sign * best:
            self._best[trial.trial_id] = result

    def on_trial_error(self, *, trial: Trial, **_: Any) -> None:
        """Mark a trial as failed, with the error's text."""
        error = _last_words(trial)
        with _warned(trial):
            run = self._run_of(trial)
            # a trial logs its own error, unless its process was killed
            error = run.client.get_run(run.run_id).data.tags.get("error") or error
            run.client.set_tag(run.run_id, "error", error)
            self._end(run, trial, "FAILED", "failed")
        self._say(trial, f"failed: {error.splitlines()[0]}")

    def _end(self, run: Run, trial: Trial, status: str, outcome: str) -> None:
        client = run.client
        client.set_tag(run.run_id, OUTCOME_TAG, outcome)
        client.set_terminated(run.run_id, status)
        forget(self._base.output, run.run_id)  # a killed process does not remove its own note
        steps = client.get_metric_history(run.run_id, "train/loss")
        began = self._began.get(trial.trial_id)
        if steps and began is not None:
            first = min(m.timestamp for m in steps) / 1000 - began
            if first > 0:  # otherwise the first step is that of an earlier, killed sweep
                log_metrics(run, {FIRST_STEP: first}, step=0)

    def _run_of(self, trial: Trial) -> Run:
        """Return the trial's run; create it if the trial ended before it could."""
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


@contextmanager
def _warned(trial: Trial) -> Iterator[None]:
    """Turn a failure of MLflow into a warning: it must not hide an outcome or end the sweep."""
    try:
        yield
    except Exception as problem:
        reason = next(iter(str(problem).splitlines()), type(problem).__name__)[:300]
        what = f"the outcome of trial {_config(trial).number}"
        print(f"warning: MLflow could not record {what} ({reason})", file=sys.stderr, flush=True)


def _config(trial: Trial) -> TrialConfig:
    config: TrialConfig = trial.config["trial"]
    return config


def _described(config: TrialConfig) -> str:
    return "  ".join(assignment(name, value) for name, value in config.point.items())


def assignment(name: str, value: Any) -> str:
    """Format a parameter and its value, with three significant digits."""
    return f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"


def _last_words(trial: Trial) -> str:
    """Return the end of the traceback that Ray Tune stored of a failure, its last line first."""
    path = trial.error_file
    if path is None or not Path(path).exists():
        return "the trial's process ended without a message"
    lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
    return "\n".join(lines[-1:] + lines[-20:-1])[:5000]
