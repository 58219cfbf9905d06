"""Experiment on searches: a sampler's best trials against those of random search.

python -m sweeps.chance --annotations data/toy/annotations.json --features data/toy_features
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import optuna
import torch
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from pipelines.config.command_line import told_shortly
from pipelines.config.recipe import Recipe
from pipelines.config.recipes import toy
from pipelines.core.metric_names import MAP
from pipelines.core.storage import database_url
from pipelines.data.feature_stream import without_backbone
from pipelines.data.features import Features
from pipelines.data.plan import Plan, make_plan, read_annotations
from pipelines.experiments.experiment import Tables
from pipelines.experiments.harness import run_command
from pipelines.training.detection import DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.stepper import NonFiniteLossError
from pipelines.training.trainer import Trainer
from sweeps.localizer import SWEEP
from sweeps.study import check_space, open_study
from sweeps.suggestions import Suggestions, override
from sweeps.sweep import SweepConfig

Sampler = Literal["tpe", "random"]
SAMPLERS: tuple[Sampler, ...] = ("tpe", "random")


def measure(
    *, annotations: str, features: str, trials: int = 12, seeds: Sequence[int] = (0, 1, 2)
) -> Tables:
    """Sampler against random search: searches of the toy recipe's localizer, from several seeds.

    Only the proposals are compared. So the trials of a search run one after another and in full, in
    the ordinary training loop, without Ray Tune, workers and pruning. The seed is also that of
    training, so each seed has its own base recipe. Independent searches run in parallel, one on
    each core.

    Args:
        annotations: annotations of the toy data set.
        features: features of the toy data set, from extract_features.py.
        trials: number of trials of each search, including the base recipe.
        seeds: seeds of samplers and training.
    """
    base = SWEEP.prepare(toy())
    base = replace(base, data=replace(base.data, annotations=annotations, features=features))
    base = without_backbone(replace(base, epochs=SWEEP.epochs(base)), Features(features))
    plan = make_plan(base.data, read_annotations(base.data))
    # spawned, not forked: PyTorch's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        searches = {
            (seed, sampler): pool.submit(
                search, replace(base, seed=seed), plan, trials=trials, sampler=sampler
            )
            for seed in seeds
            for sampler in SAMPLERS
        }
        rows = [
            {
                "seed": seed,
                "base": searches[seed, "random"].result()[0],
                **{f"best of {one}": max(searches[seed, one].result()) for one in SAMPLERS},
            }
            for seed in seeds
        ]
    return {f"mAP of {trials} trials of {base.epochs} epochs on features of the toy set": rows}


def search(base: Recipe, plan: Plan, *, trials: int, sampler: Sampler) -> list[float]:
    """Return the mAP of each trial of a search, the base recipe's first; 0 if the loss diverged.

    The sampler's seed is that of the base recipe.
    """
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = SweepConfig(
        name="search", epochs=base.epochs, trials=trials, sampler=sampler, seed=base.seed, base=base
    )
    with tempfile.TemporaryDirectory() as folder:
        study = open_study(
            SWEEP,
            config,
            storage=RDBStorage(database_url(f"{folder}/optuna.db")),
            name="search",
            base_point=check_space(SWEEP, base),
        )
        reached = []
        for number in range(trials):
            reached.append(_trial(study, base, plan))
            text = f"seed {base.seed}, {sampler}, trial {number + 1} of {trials}: {reached[-1]:.3f}"
            print(text, file=sys.stderr, flush=True)
        return reached


def _trial(study: optuna.Study, base: Recipe, plan: Plan) -> float:
    trial = study.ask()
    suggestions = Suggestions(base, trial)
    SWEEP.space(suggestions, base)
    recipe = override(base, suggestions.values)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            DetectionTask(recipe=recipe, plan=plan),
            LocalRuntime(recipe, plan, Path(folder)),
            weights=None,
            output=folder,
        )
        try:
            reached = trainer.run()[MAP]
        except NonFiniteLossError:
            study.tell(trial, state=TrialState.FAIL)
            return 0.0
    study.tell(trial, reached)
    return reached


if __name__ == "__main__":
    prog = "python -m sweeps.chance"
    results = Path(__file__).parent / "results" / "chance.json"
    with told_shortly():
        run_command(sys.argv[1:], measure, prog=prog, output=results)
