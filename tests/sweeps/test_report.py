"""What a sweep is summed up in."""

from dataclasses import replace

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial

from pipelines.config.recipes import toy
from sweeps.epoch_reports import RUN_ID
from sweeps.report import best_trials, command_of, pictures
from sweeps.sweep import HIGHEST_MAP, LOWEST_MEMORY, SweepConfig

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


def test_the_command_trains_as_long_as_the_base_recipe_says() -> None:
    config = SweepConfig(
        name="small", epochs=1, output="/runs of mine", base=replace(toy(), epochs=9)
    )
    (best, *_) = _study((0.3,)).trials
    assert command_of(config, best, None) == (
        "python pipelines/train.py --from-run run0 --epochs 9 --output '/runs of mine'"
    )


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_pictures_of_one_objective() -> None:
    study = _study((0.3,), (0.5,), (0.4,), (0.1,), (0.45,))
    drawn = pictures(study, (HIGHEST_MAP,), study.trials)
    assert set(drawn) == {"history", "importance", "parallel"}
    alike = _study((0.3,), (0.3,))
    assert set(pictures(alike, (HIGHEST_MAP,), alike.trials)) == {"history"}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_pictures_of_several_objectives_have_the_front() -> None:
    study = _study((0.3, 10.0), (0.5, 30.0), (0.4, 40.0), (0.4, 20.0))
    drawn = pictures(study, (HIGHEST_MAP, LOWEST_MEMORY), study.trials)
    kinds = ("history", "importance", "parallel")
    assert set(drawn) == {"front"} | {
        f"{name}_{kind}" for name in ("mAP", "peak_memory_mb") for kind in kinds
    }
