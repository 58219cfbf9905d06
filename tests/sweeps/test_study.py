"""Record of a sweep in Optuna: the base first, pruned trials as pruned, interrupted ones again."""

import statistics
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

from pipelines.config.recipe import Recipe
from pipelines.config.recipes import toy
from pipelines.core.metric_names import EPOCH, MAP, MEMORY
from re2tal.errors import UserError
from sweeps import study as study_module
from sweeps.constraints import HOST_MEMORY, MEASURED, SECONDS, SPEED, Constraint
from sweeps.epoch_reports import RUN_ID
from sweeps.report import best_trials, dashboard
from sweeps.search import parse
from sweeps.study import (
    BASE,
    SweepSearch,
    check_sampler,
    check_space,
    ended,
    open_study,
    sampler_of,
    searcher,
)
from sweeps.suggestions import Suggestions
from sweeps.sweep import HIGHEST_MAP, LOWEST_MEMORY, Sweep, SweepConfig
from sweeps.trial import FINISHED, TrialConfig
from sweeps.warm_start import trials_of


def _space(suggest: Suggestions, base: Recipe) -> None:
    suggest.log_float("optim.backbone_lr", 1e-5, 1e-2)
    if suggest.choice("model.frozen", ((), ("backbone.patch_embed",))):
        suggest.choice("optim.ema", (0.9, 0.99))


SWEEP = Sweep(name="small", space=_space, epochs=lambda base: 2, prepare=lambda recipe: recipe)
CONFIG = SweepConfig(name="small of toy", epochs=2, base=toy())


@pytest.fixture
def storage(tmp_path: Path) -> RDBStorage:
    return RDBStorage(f"sqlite:///{tmp_path / 'optuna.db'}")


def _open(
    storage: BaseStorage, sweep: Sweep = SWEEP, config: SweepConfig = CONFIG
) -> tuple[optuna.Study, SweepSearch]:
    point = check_space(sweep, toy())
    earlier = trials_of(sweep, config, toy()) if config.warm_start else []
    study = open_study(
        sweep, config, storage=storage, name="study", base_point=point, earlier=earlier
    )
    own = config.constraints
    return study, searcher(sweep, study, toy(), storage=storage, constraints=own)


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


@pytest.mark.parametrize(
    ("text", "kept", "broken"),
    [
        ("memory <= 20GiB", {MEMORY: 21474.8}, {MEMORY: 21475.0}),
        ("host_memory<=500 MB", {HOST_MEMORY: 500.0}, {HOST_MEMORY: 501.0}),
        ("mAP >= 0.4", {MAP: 0.4}, {MAP: 0.39}),
        ("frames_per_second >= 100", {SPEED: 101.0}, {SPEED: 99.0}),
        ("time <= 1.5h", {SECONDS: 5399.0}, {SECONDS: 5401.0}),
    ],
)
def test_optuna_knows_which_trials_keep_a_constraint(
    storage: RDBStorage, text: str, kept: dict[str, float], broken: dict[str, float]
) -> None:
    study, search = _open(storage, config=replace(CONFIG, constraint=(text,)))
    reports = ({**_result(0.5), **kept}, {**_result(0.9), **broken}, {RUN_ID: "c", EPOCH: 1})
    for name, result in zip("abc", reports, strict=True):
        _suggest(search, name)
        search.on_trial_complete(name, {**_result(0.6), **result, FINISHED: True})
    inside, outside, silent = study.trials
    assert inside.constraints[text] <= 0 < outside.constraints[text]
    if MAP not in kept:
        assert silent.constraints == {text: 1.0}
    (name,) = inside.user_attrs[MEASURED].keys() - {"mAP"} or {"mAP"}
    assert text.startswith(name)
    assert inside.number in [t.number for t in best_trials(study, (HIGHEST_MAP,), study.trials)]
    assert outside.number not in [
        t.number for t in best_trials(study, (HIGHEST_MAP,), study.trials)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory < 20GiB", "is not NAME <= LIMIT"),
        ("memory <= 20", "'20' is not a limit of memory .*give a number and one of GiB.*20GiB"),
        ("time <= 3d", "not a limit of time.*Write it as 90min"),
        ("memroy <= 20GiB", "trials have no measure 'memroy'. Use one of: mAP .*, memory "),
    ],
)
def test_constraints_that_nobody_can_check_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, constraint=("mAP >= 0.2", text))


def test_several_constraints_come_from_the_command_line() -> None:
    more = ["--constraint", "memory <= 20GiB", "--constraint", "time <= 2h", "--sampler", "gp"]
    config = parse(SWEEP, ["toy", *more], "")
    assert config.constraints == (Constraint.of("memory <= 20GiB"), Constraint.of("time <= 2h"))
    assert config.sampler == "gp"


def _line(suggest: Suggestions, base: Recipe) -> None:
    suggest.number("optim.clip", 0.0, 10.0)


LINE = replace(SWEEP, space=_line)
PARETO = replace(LINE, objectives=(HIGHEST_MAP, LOWEST_MEMORY))


def _searched(storage: BaseStorage, config: SweepConfig, trials: int) -> list[float]:
    """Values that a search proposes whose quality, and memory, grow with the value."""
    _, search = _open(storage, LINE, config)
    proposed = []
    for number in range(trials):
        clip = _suggest(search, str(number)).values["optim.clip"]
        report = {MAP: clip / 10, MEMORY: 100 * clip, RUN_ID: "run", EPOCH: 2, FINISHED: True}
        search.on_trial_complete(str(number), report)
        proposed.append(clip)
    return proposed


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore:Define-by-run function")  # takes long on a busy machine
@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_samplers_learn_to_keep_a_constraint(sampler: Any) -> None:
    free = replace(CONFIG, sampler=sampler)
    bound = replace(free, constraint=("memory <= 500MB",))
    # without it, towards the highest quality
    assert statistics.median(_searched(InMemoryStorage(), free, 14)[-5:]) > 7
    assert statistics.median(_searched(InMemoryStorage(), bound, 14)[-5:]) < 5.5


def test_samplers_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[Any, type[BaseSampler]] = {
        "random": RandomSampler,
        "tpe": TPESampler,
        "gp": GPSampler,
    }
    for named, kind in kinds.items():
        config = replace(CONFIG, sampler=named)
        with warnings.catch_warnings(category=ExperimentalWarning, action="ignore"):
            check_sampler(SWEEP, config)
            assert type(sampler_of(config)) is kind
    monkeypatch.setattr(study_module, "find_spec", lambda name: None)
    packages: dict[Any, str] = {"cmaes": "cmaes", "auto": "optunahub and cmaes"}
    for named, missing in packages.items():
        with pytest.raises(UserError, match=f"--sampler {named} needs {missing}, not installed"):
            check_sampler(SWEEP, replace(CONFIG, sampler=named))
    monkeypatch.setattr(study_module, "find_spec", lambda name: object())
    several = replace(SWEEP, objectives=(HIGHEST_MAP, LOWEST_MEMORY))
    bound = replace(CONFIG, sampler="cmaes", constraint=("mAP >= 0.1",))
    for sweep, config in ((several, replace(CONFIG, sampler="cmaes")), (SWEEP, bound)):
        with pytest.raises(UserError, match="one objective and no constraints"):
            check_sampler(sweep, config)


def test_a_sweep_starts_from_another_s_trials(
    tmp_path: Path, storage: RDBStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    file = tmp_path / "runs" / "first" / "optuna.db"
    proposed = _searched(RDBStorage(f"sqlite:///{file}"), CONFIG, 4)

    def narrow(suggest: Suggestions, base: Recipe) -> None:
        suggest.number("optim.clip", 0.0, sorted(proposed)[2])

    for name in ("first", str(file), str(file.parent), f"sqlite:///{file}"):
        config = replace(CONFIG, output=str(tmp_path / "runs"), warm_start=name)
        assert len(trials_of(LINE, config, toy())) == 4
    config = replace(config, constraint=("memory <= 100MB",))
    study, search = _open(storage, replace(LINE, space=narrow), config)
    out = capsys.readouterr().out
    assert "1 of 4 trials of study are left out; the first: optim.clip of" in out
    assert "starting from 3 trials of the sweep study" in out
    assert _suggest(search, "a").base
    search.on_trial_complete("a", {**_result(0.01), MEMORY: 90.0, FINISHED: True})
    base, *earlier = study.trials
    assert sorted(trial.params["optim.clip"] for trial in earlier) == sorted(proposed)[:3]
    for trial in earlier:
        assert trial.constraints == {
            "memory <= 100MB": pytest.approx(trial.params["optim.clip"] - 1)
        }
    # they are known to the sampler, and are no trials of this sweep
    assert [trial.number for trial in ended(study)] == [base.number] == [0]
    _, again = _open(storage, replace(LINE, space=narrow), config)
    assert len(study.trials) == 4  # a sweep that goes on has them already
    assert not _suggest(again, "b").base


@pytest.mark.parametrize(
    ("sweep", "studies", "constraint", "message"),
    [
        (LINE, (), (), "there is neither .*earlier/optuna.db nor a file"),
        (LINE, ("one", "two"), (), "its sweeps are one, two. Name one"),
        (PARETO, ("one",), (), "that sweep has 2 objectives, this one 1"),
        (
            SWEEP,
            ("one",),
            (),
            "no trial .* fits this one .1 finished.*it has no optim.clip",
        ),
        (LINE, ("one",), ("memory <= 1GB",), "not measure memory, which has a constraint"),
    ],
)
def test_a_sweep_that_another_cannot_start_from_is_refused(
    tmp_path: Path,
    sweep: Sweep,
    studies: tuple[str, ...],
    constraint: tuple[str, ...],
    message: str,
) -> None:
    for name in studies:
        (tmp_path / "earlier").mkdir(exist_ok=True)
        made = optuna.create_study(
            storage=f"sqlite:///{tmp_path / 'earlier' / 'optuna.db'}",
            study_name=name,
            directions=[StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE][: len(sweep.objectives)],
        )
        trial = made.ask()
        sweep.space(Suggestions(toy(), trial), toy())
        made.tell(trial, [0.5] * len(sweep.objectives))
    config = replace(CONFIG, output=str(tmp_path), warm_start="earlier", constraint=constraint)
    with pytest.raises(UserError, match=message):
        trials_of(LINE, config, toy())


def test_a_storage_that_is_missing_or_broken_is_not_made(tmp_path: Path) -> None:
    missing, broken = tmp_path / "missing.db", tmp_path / "broken.db"
    broken.write_text("no data base at all")
    for warm, message in ((f"sqlite:///{missing}", "there is neither"), (str(broken), "read it")):
        with pytest.raises(UserError, match=message):
            trials_of(LINE, replace(CONFIG, warm_start=warm), toy())
    assert not missing.exists()


def test_the_storage_is_named_with_the_program_that_shows_it() -> None:
    told = dashboard("postgresql://ann:secret@host/optuna?options=-csearch_path%3Doptuna")
    assert "optuna-dashboard 'postgresql://ann:***@host/optuna?options" in told
    assert "secret" not in told
