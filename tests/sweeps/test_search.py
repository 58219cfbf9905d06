"""Early stopping of trials, which never stops the base recipe."""

from dataclasses import replace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from pipelines.config.recipes import toy
from pipelines.core.metric_names import EPOCH, MAP
from sweeps.driver import scheduler
from sweeps.finetune import SWEEP
from sweeps.sweep import HIGHEST_MAP, LOWEST_MEMORY, SweepConfig
from sweeps.trial import TrialConfig

CONFIG = SweepConfig(name="small of toy", epochs=3, base=toy())


class _Others:
    """Answers of Ray Tune's controller on the other trials: one waits for its turn."""

    def get_live_trials(self) -> list[Trial]:
        return [_trial(99)]


def _trial(number: int) -> Trial:
    config = TrialConfig(number=number, values={}, point={}, base=number == 0)
    return Trial("train", config={"trial": config}, stub=True)


def _decisions(rule: TrialScheduler, values: list[float]) -> list[str]:
    """Decisions on trials that all report their first epoch, the base's first."""
    trials = [_trial(number) for number in range(len(values))]
    for trial in trials:
        rule.on_trial_add(_Others(), trial)
    results: list[dict[str, Any]] = [
        {MAP: value, EPOCH: 1, "time_total_s": 1.0} for value in values
    ]
    return [
        rule.on_trial_result(_Others(), trial, result)
        for trial, result in zip(trials, results, strict=True)
    ]


@pytest.mark.parametrize("pruning", ["asha", "median"])
def test_the_worst_are_stopped(pruning: Any) -> None:
    rule = scheduler(SWEEP, replace(CONFIG, pruning=pruning))
    decisions = _decisions(rule, [0.5, 0.6, 0.7, 0.8, 0.1])
    assert decisions[:4] == [TrialScheduler.CONTINUE] * 4
    assert decisions[4] == TrialScheduler.STOP


@pytest.mark.parametrize("pruning", ["asha", "median"])
def test_the_base_recipe_comes_to_its_end(pruning: Any) -> None:
    rule = scheduler(SWEEP, replace(CONFIG, pruning=pruning))
    others = [_trial(number) for number in range(1, 6)]
    base = _trial(0)
    for trial in (*others, base):
        rule.on_trial_add(_Others(), trial)
    for trial in others:
        rule.on_trial_result(_Others(), trial, {MAP: 0.9, EPOCH: 1, "time_total_s": 1.0})
    result = {MAP: 0.0, EPOCH: 1, "time_total_s": 1.0}
    assert rule.on_trial_result(_Others(), base, result) == TrialScheduler.CONTINUE
    later = {MAP: 0.0, EPOCH: 2, "time_total_s": 2.0}
    assert rule.on_trial_result(_Others(), base, later) == TrialScheduler.CONTINUE


def test_the_last_epoch_stops_no_trial() -> None:
    rule = scheduler(SWEEP, CONFIG)
    trial = _trial(1)
    rule.on_trial_add(_Others(), trial)
    for epoch in (1, 2, 3):
        result = {MAP: 0.5, EPOCH: epoch, "time_total_s": 1.0}
        assert rule.on_trial_result(_Others(), trial, result) == TrialScheduler.CONTINUE


def test_where_nothing_can_be_stopped_trials_take_turns() -> None:
    several = replace(SWEEP, objectives=(HIGHEST_MAP, LOWEST_MEMORY))
    for sweep, config in (
        (several, CONFIG),
        (SWEEP, replace(CONFIG, pruning="none")),
        (SWEEP, replace(CONFIG, epochs=1)),
    ):
        assert type(scheduler(sweep, config)) is FIFOScheduler


@pytest.mark.parametrize(
    ("whole", "trial", "first"),
    [((50, 16), 25, 8), ((50, 16), 1, 1), ((4, 4), 2, 2), ((4, 1), 2, 1)],
)
def test_trials_are_evaluated_from_the_same_share_of_their_epochs_on(
    whole: tuple[int, int], trial: int, first: int
) -> None:
    base = replace(toy(), epochs=whole[0], evaluate_from=whole[1])
    recipe = replace(CONFIG, epochs=trial, base=base).trial_recipe
    assert (recipe.epochs, recipe.evaluate_from) == (trial, first)
