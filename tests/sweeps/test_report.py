"""What a sweep is summed up in."""

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from rich.console import Console

from pipelines.config.recipes import toy
from pipelines.core.tracking import start_run
from re2tal.errors import UserError
from sweeps.epoch_reports import RUN_ID
from sweeps.localizer import SWEEP
from sweeps.report import _table, best_trials, command_of, pictures, report
from sweeps.sweep import HIGHEST_MAP, LOWEST_MEMORY, SweepConfig

ROOT = Path(__file__).parents[2]
RATES = FloatDistribution(1e-4, 1e-1, log=True)
KINDS = CategoricalDistribution(["none", "some"])


def _study(*values: tuple[float, ...]) -> optuna.Study:
    study = optuna.create_study(
        directions=["maximize", "minimize"] if len(values[0]) > 1 else ["maximize"]
    )
    for index, reached in enumerate(values):
        study.add_trial(
            create_trial(
                values=list(reached),
                params={"rate": 10 ** -(1 + index % 4), "kind": KINDS.choices[index % 2]},
                distributions={"rate": RATES, "kind": KINDS},
                user_attrs={RUN_ID: f"run{index}"},
            )
        )
    return study


def test_the_best_come_first() -> None:
    study = _study((0.3,), (0.5,), (0.4,))
    best = best_trials(study, (HIGHEST_MAP,), study.trials)
    assert [trial.number for trial in best] == [1, 2, 0]


def test_of_several_objectives_the_front_is_the_best() -> None:
    study = _study((0.3, 10.0), (0.5, 30.0), (0.4, 40.0), (0.4, 20.0))
    best = best_trials(study, (HIGHEST_MAP, LOWEST_MEMORY), study.trials)
    assert [trial.number for trial in best] == [1, 3, 0]


def test_the_command_trains_as_long_as_the_base_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SweepConfig(
        name="small", epochs=1, output="/runs of mine", base=replace(toy(), epochs=9)
    )
    (best, *_) = _study((0.3,)).trials
    for place, script in ((ROOT, "pipelines/train.py"), (tmp_path, f"{ROOT}/pipelines/train.py")):
        monkeypatch.chdir(place)  # the words work from there, without a path to Python
        python, command = command_of(config, best, None).split(" ", 1)
        assert Path(python).samefile(sys.executable)
        assert command == f"{script} --from-run run0 --epochs 9 --output '/runs of mine'"


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_the_trial_that_came_nearest_is_named_where_none_keeps_the_constraints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = SweepConfig(
        name="small", epochs=1, output=str(tmp_path), base=toy(), constraint=("memory <= 1GB",)
    )
    run = start_run(config, output=config.output)
    study = optuna.create_study(direction="maximize")
    for value, memory in ((0.9, 4000.0), (0.3, 1500.0)):
        trial = create_trial(
            value=value,
            params={"rate": value / 10},
            distributions={"rate": RATES},
            user_attrs={"measured": {"memory": memory}},
        )
        trial.set_constraint("memory <= 1GB", memory / 1000 - 1)
        study.add_trial(trial)
    said = "No trial satisfies memory <= 1GB: trial 1, the nearest, reported memory 1500 MB"
    with pytest.raises(UserError, match=said):
        report(SWEEP, config, run, study)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_pictures_of_one_objective() -> None:
    study = _study((0.3,), (0.5,), (0.4,), (0.1,), (0.45,))
    drawn = pictures(study, (HIGHEST_MAP,), study.trials)
    assert set(drawn) == {"history", "importance", "parallel"}
    alike = _study((0.3,), (0.3,))
    assert set(pictures(alike, (HIGHEST_MAP,), alike.trials)) == {"history"}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_pictures_have_readable_names_and_the_pruned_trials() -> None:
    study = optuna.create_study(direction="maximize")
    names = ("model.localizer.head_layers", "model.localizer.heads", "model.heads")

    def add(value: float | None, params: dict[str, float], **more: Any) -> None:
        kinds: dict[str, BaseDistribution] = dict.fromkeys(params, FloatDistribution(0, 1))
        study.add_trial(create_trial(value=value, params=params, distributions=kinds, **more))

    add(0.3, dict.fromkeys(names, 0.2))
    add(
        None,
        dict.fromkeys(names, 0.4),
        state=TrialState.PRUNED,
        intermediate_values={1: 0.1, 2: 0.2},
    )
    add(0.5, dict.fromkeys(names, 0.7))
    finished = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    drawn = pictures(study, (HIGHEST_MAP,), finished)
    named = {label.get_text() for label in drawn["parallel"].axes[0].get_xticklabels()}
    assert named == {HIGHEST_MAP.title, "head_layers", "localizer.heads", "model.heads"}
    (lines,) = drawn["parallel"].axes[0].collections
    assert all(color[:3].min() < 0.8 for color in lines.to_rgba(np.array([0.3, 0.5])))
    (best, *_) = best_trials(study, (HIGHEST_MAP,), finished)
    table = Console(width=200, file=io.StringIO())
    table.print(_table(SWEEP, [best], None, []))
    printed = table.file.getvalue()  # type: ignore[attr-defined]
    assert "head_layers=0.7, localizer.heads=0.7, model.heads=0.7" in printed
    marked = drawn["history"].axes[0].collections[-1].get_offsets()
    assert np.array_equal(marked, [[1, 0.2]])


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_pictures_of_several_objectives_have_the_front() -> None:
    study = _study((0.3, 10.0), (0.5, 30.0), (0.4, 40.0), (0.4, 20.0))
    drawn = pictures(study, (HIGHEST_MAP, LOWEST_MEMORY), study.trials)
    kinds = ("history", "importance", "parallel")
    assert set(drawn) == {"front"} | {
        f"{name}_{kind}" for name in ("mAP", "peak_memory_mb") for kind in kinds
    }
    # the best of either is the darkest: the highest mAP, the lowest memory
    for name, best, worst in (("mAP", 0.5, 0.3), ("peak_memory_mb", 10.0, 40.0)):
        (lines,) = drawn[f"{name}_parallel"].axes[0].collections
        dark, light = lines.to_rgba(np.array([best, worst]))[:, :3].sum(1)
        assert dark < light - 0.5
