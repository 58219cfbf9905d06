"""What stops trials that do worse than others, and never the base recipe's."""

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from sweeps.settings import SweepConfig
from sweeps.sweep import Objective, Sweep
from sweeps.trial import EPOCH


def _is_base(trial: Trial) -> bool:
    # a trial has no configuration before the searcher made it one
    return bool(trial.config and "trial" in trial.config and trial.config["trial"].base)


class _Halving(ASHAScheduler):
    """Asynchronous successive halving (Li et al., MLSys 2020) that lets the base recipe end.

    What a sweep gained is what it gained over that.
    """

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if _is_base(trial) else decision


class _Median(MedianStoppingRule):
    """The median stopping rule (Golovin et al., KDD 2017) that lets the base recipe end."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if _is_base(trial):
            return TrialScheduler.CONTINUE
        decision: str = super().on_trial_result(tune_controller, trial, result)
        # a trial that yielded its time to others would start anew
        return TrialScheduler.CONTINUE if decision == TrialScheduler.PAUSE else decision


def scheduler(sweep: Sweep, config: SweepConfig) -> TrialScheduler:
    """The scheduler that a sweep asks for.

    Args:
        sweep: what is searched; a search for several objectives stops no trial, because what a
            stopped trial did not need would look cheap.
        config: of the sweep; of trials of a single epoch there is nothing to stop.
    """
    objectives: tuple[Objective, ...] = sweep.objectives
    if config.pruning == "none" or config.epochs == 1 or len(objectives) > 1:
        return FIFOScheduler()
    metric = {"metric": objectives[0].metric, "mode": objectives[0].mode, "time_attr": EPOCH}
    if config.pruning == "median":
        return _Median(**metric, grace_period=1, min_samples_required=3)
    # one more than there are epochs: a trial that reaches it would be stopped before its results
    return _Halving(**metric, max_t=config.epochs + 1, grace_period=1, reduction_factor=3)
