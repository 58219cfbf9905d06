"""What Optuna keeps of a sweep: the base first, pruned trials as pruned, interrupted ones again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from pipelines.config.recipe import Recipe
from pipelines.config.recipes import toy
from pipelines.core.metric_names import MAP
from sweeps.epoch_reports import MEMORY, RUN_ID
from sweeps.study import BASE, SweepSearch, check_space, ended, open_study, searcher
from sweeps.suggestions import Suggestions
from sweeps.sweep import HIGHEST_MAP, LOWEST_MEMORY, Sweep, SweepConfig
from sweeps.trial import EPOCH, FINISHED, TrialConfig


def _space(suggest: Suggestions, base: Recipe) -> None:
    suggest.log_float("optim.backbone_lr", 1e-5, 1e-2)
    if suggest.choice("model.frozen", ((), ("backbone.patch_embed",))):
        suggest.choice("optim.ema", (0.9, 0.99))


SWEEP = Sweep(name="small", space=_space, epochs=lambda base: 2, prepare=lambda recipe: recipe)
CONFIG = SweepConfig(name="small of toy", epochs=2, base=toy())


@pytest.fixture
def storage(tmp_path: Path) -> RDBStorage:
    return RDBStorage(f"sqlite:///{tmp_path / 'optuna.db'}")


def _open(storage: RDBStorage, sweep: Sweep = SWEEP) -> tuple[optuna.Study, SweepSearch]:
    point = check_space(sweep, toy())
    study = open_study(sweep, CONFIG, storage=storage, name="study", base_point=point)
    return study, searcher(sweep, study, toy(), storage=storage)


def _suggest(search: SweepSearch, name: str) -> TrialConfig:
    config: dict[str, Any] | None = search.suggest(name)
    assert config is not None
    trial: TrialConfig = config["trial"]
    return trial


def _result(value: float, **more: Any) -> dict[str, Any]:
    return {MAP: value, RUN_ID: f"run of {value}", EPOCH: 1, **more}


def test_the_first_trial_is_the_base_recipe_s(storage: RDBStorage) -> None:
    study, search = _open(storage)
    first, second = (_suggest(search, name) for name in "ab")
    assert first.base
    assert first.number == 0
    assert first.values == {"optim.backbone_lr": toy().optim.backbone_lr, "model.frozen": ()}
    assert not second.base
    assert [BASE in trial.user_attrs for trial in study.trials] == [True, False]
    assert second.values != first.values


def test_trials_are_told_as_finished_pruned_and_failed(storage: RDBStorage) -> None:
    study, search = _open(storage)
    for name in "abc":
        _suggest(search, name)
    search.on_trial_result("a", _result(0.4))
    search.on_trial_complete("a", _result(0.5, **{FINISHED: True}))
    search.on_trial_complete("b", _result(0.2))  # Ray Tune passes on no result that stops a trial
    search.on_trial_complete("c", None, error=True)
    complete, pruned, failed = study.trials
    assert (complete.state, complete.value) == (TrialState.COMPLETE, 0.5)
    assert complete.user_attrs[RUN_ID] == "run of 0.5"
    assert (pruned.state, pruned.value) == (TrialState.PRUNED, 0.2)
    assert pruned.user_attrs[RUN_ID] == "run of 0.2"
    assert failed.state == TrialState.FAIL
    assert len(ended(study)) == 3


def test_what_was_under_way_when_a_sweep_was_killed_is_tried_again(storage: RDBStorage) -> None:
    _, search = _open(storage)
    _suggest(search, "a")
    search.on_trial_complete("a", _result(0.5, **{FINISHED: True}))
    lost = _suggest(search, "b")
    later = _suggest(search, "c")
    # the process dies here: nothing but the file is left
    study, search = _open(storage)
    assert [trial.number for trial in ended(study)] == [0]
    again = [_suggest(search, name) for name in "de"]
    assert [trial.values for trial in again] == [lost.values, later.values]
    new = _suggest(search, "f")
    assert new.values not in [lost.values, later.values]
    study, search = _open(storage)
    assert [trial.number for trial in ended(study)] == [0]  # the interrupted never count
    assert [_suggest(search, name).values for name in "ghi"] == [
        *(t.values for t in again),
        new.values,
    ]


def test_several_objectives_are_learnt_from_together(storage: RDBStorage) -> None:
    sweep = replace(SWEEP, objectives=(HIGHEST_MAP, LOWEST_MEMORY))
    study, search = _open(storage, sweep)
    for name, quality, memory in (("a", 0.5, 100.0), ("b", 0.4, 50.0), ("c", 0.3, 80.0)):
        _suggest(search, name)
        search.on_trial_complete(name, _result(quality, **{MEMORY: memory, FINISHED: True}))
    assert [trial.values for trial in study.trials] == [[0.5, 100.0], [0.4, 50.0], [0.3, 80.0]]
    assert [trial.number for trial in study.best_trials] == [0, 1]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("trials", 0, "--trials must be"), ("minutes", 0.0, "--minutes"), ("epochs", 0, "--epochs")],
)
def test_settings_that_make_no_sweep_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **{field: value})
