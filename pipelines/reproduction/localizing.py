"""A detector trained in one of the ways that are compared: on features, plain, or reversible."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import tyro

from pipelines.config.recipe import Recipe
from pipelines.config.recipes import RECIPES
from pipelines.data.plan import make_plan, read_annotations
from pipelines.data.videos import probe_files_here
from pipelines.reproduction.experiment import Result
from pipelines.reproduction.training import train_here
from pipelines.training.activations import activation_metrics
from pipelines.training.detection import DetectionTask
from pipelines.training.model import build_detector

Way = Literal["features", "plain", "reversible"]
WAYS: dict[Way, str] = {
    "features": "features of a frozen backbone",
    "plain": "end to end, plain",
    "reversible": "end to end, reversible",
}


def configured(recipe: str, options: Sequence[str]) -> Recipe:
    """A recipe with other values for some fields; ends the program if one does not exist.

    Args:
        recipe: a key of `RECIPES`.
        options: as of `train.py`.
    """
    default = RECIPES[recipe]()
    return tyro.cli(Recipe, default=default, args=options, prog=f"reproduce.py ... -- [{recipe}]")


def localize(*, recipe: str, options: Sequence[str], way: Way, seed: int) -> Result:
    """Trains a detector and evaluates it.

    A toy recipe is trained in this process; any other by Ray Train, as `train.py` does it, in a run
    of its own.

    Args:
        recipe: a key of `RECIPES`.
        options: as of `train.py`.
        way: a key of `WAYS`.
        seed: of windows, order and random weights.

    Returns:
        mAP, that at every threshold, the predicted memory of a worker's step in MB, seconds; and of
        a run in MLflow its id.
    """
    asked = trained_in(configured(recipe, options), way, seed)
    return _here(asked) if asked.data.make_toy else _on_the_cluster(asked)


def trained_in(recipe: Recipe, way: Way, seed: int) -> Recipe:
    """A recipe of which one way is trained.

    Only the backbone differs: the windows, their order and the localizer's first weights are the
    same. The features of a frozen backbone are computed anew, those of the very same windows.

    Args:
        recipe: that is compared.
        way: a key of `WAYS`.
        seed: of the run.
    """
    model = replace(
        recipe.model,
        reversible=way == "reversible",
        frozen=("backbone",) if way == "features" else recipe.model.frozen,
    )
    return replace(recipe, seed=seed, model=model)


def _here(recipe: Recipe) -> Result:
    annotations = read_annotations(recipe.data)
    plan = make_plan(recipe.data, annotations, probe=probe_files_here)
    detector = build_detector(recipe, plan.classes, recipe.model.weights)
    memory = activation_metrics(recipe, detector)["memory/predicted_activations_mb"]
    trained = train_here(DetectionTask(recipe=recipe, plan=plan), recipe.model.weights)
    return _reached(trained.metrics) | {"activations_mb": memory, "seconds": trained.seconds}


def _on_the_cluster(recipe: Recipe) -> Result:
    from pipelines.training.run import train  # the toy experiments run without Ray

    run = train(recipe)
    found = run.client.get_run(run.run_id)
    metrics = found.data.metrics
    return _reached(metrics) | {
        "activations_mb": metrics["memory/predicted_activations_mb"],
        "seconds": ((found.info.end_time or 0) - found.info.start_time) / 1000,
        "run_id": run.run_id,
    }


def _reached(metrics: dict[str, float]) -> dict[str, float]:
    return {
        name.removeprefix("val/"): value
        for name, value in metrics.items()
        if name.startswith("val/mAP")
    }
