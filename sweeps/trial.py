"""One trial: what `train.py` does, with other values for some fields, started by Ray Tune."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlflow.entities import Param
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from ray import tune

from pipelines.core.cluster import quiet_data
from pipelines.core.metric_names import MAP
from pipelines.core.tracking import Run, log_metrics
from pipelines.train import Prepared, train_run
from pipelines.training.resuming import resume_or_start
from sweeps.epoch_reports import MEMORY, RUN_ID, EpochReports
from sweeps.overrides import override

NUMBER_TAG = "sweep.trial"
OUTCOME_TAG = "sweep.outcome"
SEARCHED = "searched."  # before the names of searched parameters, beside those that all runs have

FINISHED, EPOCH = "finished", "epoch"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialConfig:
    """What a trial is told.

    Attributes:
        number: of the Optuna trial.
        values: for fields of the recipe, by dotted name.
        point: what Optuna proposed: names and primitive values.
        base: whether it trains the base recipe.
    """

    number: int
    values: dict[str, Any]
    point: dict[str, Any]
    base: bool


def run_trial(config: Mapping[str, Any], *, ready: Prepared, parent: str, threads: int) -> None:
    """Trains a trial; what Ray Tune starts.

    Args:
        config: a `TrialConfig` under "trial"; Ray Tune hands over dictionaries.
        ready: the base recipe, and the videos that all trials work on.
        parent: id of the sweep's run in MLflow.
        threads: of a worker's PyTorch.
    """
    quiet_data()
    trial: TrialConfig = config["trial"]
    ready = replace(ready, recipe=override(ready.recipe, trial.values))
    run, _ = resume_or_start(ready.recipe, ready.plan, parent=parent)
    _name(run, trial, ready.recipe.name)
    train_run(ready, run, callbacks=[EpochReports(run.run_id)], threads=threads)
    memory = peak_memory(run)
    log_metrics(run, memory, step=0)
    # also when all epochs were through before this trial was started again
    tune.report({**_last_metrics(run), **memory, EPOCH: ready.recipe.epochs, FINISHED: True})


def _name(run: Run, trial: TrialConfig, recipe: str) -> None:
    client = run.client
    client.set_tag(run.run_id, NUMBER_TAG, trial.number)
    what = "base" if trial.base else f"trial {trial.number}"
    client.set_tag(run.run_id, MLFLOW_RUN_NAME, f"{recipe} {what}")
    log_searched(run, trial.point)


def log_searched(run: Run, point: Mapping[str, Any]) -> None:
    """Puts what was proposed for a run beside the parameters that all runs have.

    Args:
        run: that tries it.
        point: names and values.
    """
    params = [Param(f"{SEARCHED}{name}", str(value)) for name, value in point.items()]
    run.client.log_batch(run.run_id, params=params)


def _last_metrics(run: Run) -> dict[str, Any]:
    """The last epoch's quality, which is what all trials are compared by."""
    metrics = run.client.get_run(run.run_id).data.metrics
    return {MAP: metrics[MAP], RUN_ID: run.run_id}


def peak_memory(run: Run) -> dict[str, float]:
    """The memory that a trial is judged by.

    It is the measured peak of a GPU or, without one, the predicted peak of the activations of a
    worker's step.

    Args:
        run: that has ended.

    Returns:
        One metric in MB; none if the run trained on features on a CPU.
    """
    for name in ("memory/cuda_peak_mb", "memory/predicted_activations_mb"):
        values = [m.value for m in run.client.get_metric_history(run.run_id, name)]
        if values:
            return {MEMORY: max(values)}
    return {}
