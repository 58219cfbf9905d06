"""Run of a sweep: Ray Tune starts its trials, Optuna proposes them, MLflow records them."""

import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from pipelines.core.metric_names import EPOCH
from pipelines.core.resources import capacity, require_resources
from pipelines.core.storage import absolute, database_url, join
from pipelines.core.tracking import Run, finishing, start_run, take_up
from pipelines.core.underway import alone, forget, is_under_way
from pipelines.training.resuming import digest, last_run, mark
from pipelines.training.run import Prepared, prepare
from re2tal.errors import UserError, count_of
from sweeps.report import FINISHED_TRIALS, TRIALS, dashboard, report
from sweeps.study import check_sampler, check_space, ended, open_study, searcher
from sweeps.sweep import Objective, Sweep, SweepConfig
from sweeps.trial import NUMBER_TAG, OUTCOME_TAG, Outcomes, children, run_trial
from sweeps.warm_start import trials_of

_ORPHAN_SECONDS = 60.0
_DRIVER_CPUS = 0.01  # CPUs of the process that supervises a trial; Ray Tune does not accept 0


def run_sweep(sweep: Sweep, config: SweepConfig) -> Run:
    """Run a sweep to its end, or continue it.

    Returns:
        The sweep's run in MLflow.

    Raises:
        UserError: the space does not fit the base recipe; the cluster cannot hold one trial, or the
            requested number at a time; or recipe or data have problems.
    """
    config = replace(config, output=absolute(config.output))
    with _quiet():
        return _run(sweep, config)


def _run(sweep: Sweep, config: SweepConfig) -> Run:
    base = config.trial_recipe
    base = replace(base, save_raw=base.save_raw or sweep.postprocessing)
    base_point = check_space(sweep, base)
    check_sampler(sweep, config)
    earlier = trials_of(sweep, config, base) if config.warm_start is not None else []
    ready, _ = prepare(base)
    if ready.plan.features is not None and not base.scale.gpu:
        for one in config.constraints:
            if one.name == "memory":
                raise UserError(
                    f"--constraint {one.text!r}: trials on features without GPUs do not measure "
                    "it. Use host_memory."
                )
    at_a_time = concurrency(config, ready)
    run = _parent(config, ready)
    with finishing(run):
        storage = RDBStorage(config.storage or _file(config, run))
        study = open_study(
            sweep,
            config,
            storage=storage,
            name=run.run_id,
            base_point=base_point,
            earlier=earlier,
        )
        print(f"Optuna's trials: {dashboard(storage.url)}", flush=True)
        end_children(run, study, output=config.output)
        done = len(ended(study))
        if done < config.trials:
            _search(sweep, config, ready, run, study, storage, at_a_time=at_a_time, done=done)
            # once more: processes of a killed sweep may have started runs meanwhile
            end_children(run, study, output=config.output)
        report(sweep, config, run, study)
    return run


def _search(
    sweep: Sweep,
    config: SweepConfig,
    ready: Prepared,
    run: Run,
    study: optuna.Study,
    storage: RDBStorage,
    *,
    at_a_time: int,
    done: int,
) -> None:
    left = config.trials - done
    print(
        f"{left} of {count_of(config.trials, 'trial')} of {count_of(config.epochs, 'epoch')}, "
        f"{at_a_time} at a time: "
        f"MLflow run {run.run_id} in {run.uri}",
        flush=True,
    )
    rule = scheduler(sweep, config)
    threads = _threads(ready.recipe.scale.workers * at_a_time)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_trial, ready=ready, parent=run.run_id, threads=threads),
            {"CPU": _DRIVER_CPUS},
        ),
        tune_config=tune.TuneConfig(
            search_alg=searcher(
                sweep, study, ready.recipe, storage=storage, constraints=config.constraints
            ),
            scheduler=rule,
            num_samples=left,
            max_concurrent_trials=at_a_time,
            # the next trial saves the imports if it reuses the process; but a trial that the rule
            # stops leaves its process in an unknown state
            reuse_actors=type(rule) is FIFOScheduler,
            time_budget_s=None if config.minutes is None else 60 * config.minutes,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{done}",  # a new name: sweeps resume from Optuna's study, not Ray Tune's
            storage_path=join(config.output, run.run_id),
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
            callbacks=[
                Outcomes(
                    run,
                    ready.recipe,
                    total=config.trials,
                    done=done,
                    objectives=sweep.objectives,
                )
            ],
        ),
    )
    print("starting the first trials, each in processes of its own ...", flush=True)
    tuner.fit()


def concurrency(config: SweepConfig, ready: Prepared) -> int:
    """Return the number of trials at a time.

    Raises:
        UserError: the cluster cannot hold one trial, or the requested number.
    """
    scale = ready.recipe.scale
    decoding = 0.0 if ready.plan.features is not None else scale.cpus_per_decoder
    cpus = _DRIVER_CPUS + scale.workers * scale.cpus_per_worker + decoding
    gpus = scale.workers if scale.gpu else 0
    wanted = config.concurrency or 1
    require_resources(
        cpus=wanted * cpus,
        gpus=wanted * gpus,
        who="the processes of one trial" if wanted == 1 else f"{wanted} trials at a time",
        advice="Lower --concurrency, --base.scale.workers, --base.scale.cpus-per-worker or "
        "--base.scale.cpus-per-decoder, or search without GPUs (--base.scale.no-gpu).",
    )
    if config.concurrency is not None:
        return config.concurrency
    have = capacity()
    fits = [have["CPU"] / cpus]
    if gpus:
        fits.append(have["GPU"] / gpus)
    # the epsilon: 0.3 / 0.1 is a little less than 3
    return min(config.trials, math.floor(min(fits) + 1e-6))


def _threads(workers: int) -> int:
    """Divide the cores among the workers of all trials that run at the same time."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    cores = min(node["Resources"].get("CPU", 1.0) for node in nodes)
    return max(1, int(cores / math.ceil(workers / len(nodes))))


def _parent(config: SweepConfig, ready: Prepared) -> Run:
    """Return the last run of the same search if it is unfinished, else a new one."""
    output = config.output
    # another length or layout on the cluster does not make it another sweep
    search = replace(config, trials=1, concurrency=None, minutes=None, storage=None)
    marked = mark(config, digest(search, ready.plan), output=output)
    with alone(output):  # of two equal commands, the second sees the first one's run
        run = last_run(config, marked, output=output) if config.resume else None
        if run is None or is_through(run, config):
            return start_run(config, output=output, tags=marked)
        take_up(run, output=output)
    print(f"continuing the sweep {run.run_id}; --no-resume starts a new one", flush=True)
    return run


# Optuna's state of an ended trial: status and outcome of its MLflow run
_KNOWN = {
    TrialState.COMPLETE: ("FINISHED", "finished"),
    TrialState.PRUNED: ("KILLED", "pruned"),
    TrialState.FAIL: ("FAILED", "failed"),
}


def end_children(run: Run, study: optuna.Study, *, output: str) -> None:
    """End the runs that a killed sweep left RUNNING, once their processes are gone.

    Args:
        run: the sweep's run, which this process continues.
        study: the sweep's study, which knows how trials ended and which were interrupted.
        output: folder of the default store.
    """
    states = {str(t.number): t.state for t in ended(study)}
    for child in children(run):
        run_id, tags = child.info.run_id, child.data.tags
        number = tags.get(NUMBER_TAG)  # a search of post-processing has none
        unknown = number is not None and OUTCOME_TAG not in tags
        if not unknown and child.info.status != "RUNNING":
            continue
        _wait_until_gone(run_id, output)
        state = states.get(number) if number is not None else None
        status, outcome = _KNOWN[state] if state is not None else ("KILLED", "interrupted")
        if unknown:
            run.client.set_tag(run_id, OUTCOME_TAG, outcome)
        if unknown and state is None and "error" in tags:
            # the trial's process reported the end of the sweep, and so of Ray, as an error
            run.client.delete_tag(run_id, "error")
            run.client.set_terminated(run_id, status)
        if run.client.get_run(run_id).info.status == "RUNNING":
            run.client.set_terminated(run_id, status)
        forget(output, run_id)


def _wait_until_gone(run_id: str, output: str) -> None:
    """Wait for the end of a trial's process, some seconds after that of its sweep."""
    until = time.monotonic() + _ORPHAN_SECONDS
    while is_under_way(output, run_id) and time.monotonic() < until:
        time.sleep(0.2)


def is_through(run: Run, config: SweepConfig) -> bool:
    """Tell whether a sweep has made its trials, so that the same command begins a new one."""
    last = run.client.get_run(run.run_id)
    metrics = last.data.metrics
    fruitless = metrics.get(FINISHED_TRIALS) == 0  # there is nothing to report
    over = last.info.status == "FINISHED" or fruitless
    return over and int(metrics.get(TRIALS, 0)) >= config.trials


def _file(config: SweepConfig, run: Run) -> str:
    if "://" in config.output:
        raise UserError(
            f"{config.output} can hold checkpoints, but not Optuna's trials: name a database with "
            "--storage URL."
        )
    folder = Path(config.output) / run.run_id
    folder.mkdir(parents=True, exist_ok=True)
    return database_url(folder / "optuna.db")


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off the tables, files and messages of Ray Tune and Optuna: a sweep prints its own."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a sweep reports failed trials itself
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        # Ray Tune warns when a sampler takes more than a second
        warnings.filterwarnings("ignore", "Define-by-run function", UserWarning)
        yield


def _is_base(trial: Trial) -> bool:
    # a trial has no configuration until the searcher proposes one
    return bool(trial.config and "trial" in trial.config and trial.config["trial"].base)


class _Halving(ASHAScheduler):
    """Asynchronous successive halving (Li et al., MLSys 2020) that never stops the base recipe.

    The gain of a sweep is measured against the base recipe.
    """

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if _is_base(trial) else decision


class _Median(MedianStoppingRule):
    """Median stopping rule (Golovin et al., KDD 2017) that never stops the base recipe."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = TrialScheduler.CONTINUE
        if _is_base(trial):
            return decision
        decision = super().on_trial_result(tune_controller, trial, result)
        # a paused trial would start from the beginning
        return TrialScheduler.CONTINUE if decision == TrialScheduler.PAUSE else decision


def scheduler(sweep: Sweep, config: SweepConfig) -> TrialScheduler:
    """Return the rule that stops trials which do worse than others.

    A search for several objectives stops no trial, because a stopped trial would look cheap; trials
    of a single epoch cannot be stopped early.
    """
    objectives: tuple[Objective, ...] = sweep.objectives
    if config.pruning == "none" or config.epochs == 1 or len(objectives) > 1:
        return FIFOScheduler()
    metric = {"metric": objectives[0].metric, "mode": objectives[0].mode, "time_attr": EPOCH}
    if config.pruning == "median":
        return _Median(**metric, grace_period=1, min_samples_required=3)
    # one more than the epochs: a trial that reaches `max_t` is stopped, before its final report
    return _Halving(**metric, max_t=config.epochs + 1, grace_period=1, reduction_factor=3)
