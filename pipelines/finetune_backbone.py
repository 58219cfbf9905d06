"""Finetunes a rewired backbone on trimmed videos (step 4 of Re2TAL), and writes its weights.

Toy clips, from the weights that the repository ships, minutes on two CPU cores:

  python pipelines/finetune_backbone.py

Kinetics, from pretrained weights:

  python pipelines/finetune_backbone.py kinetics_re2_swin_t --data.training train.csv
  --data.validation validate.csv --data.videos FOLDER
  --model.weights torchvision:swin3d_t/KINETICS400_V1

Slowly instead of at once (Dr2Net), and plain pretraining from random weights:

  python pipelines/finetune_backbone.py --model.coupling-epochs 1.5
  python pipelines/finetune_backbone.py --model.no-reversible --model.weights None

train.py takes what comes out as --model.weights: the file, or its URI in MLflow; both are printed.
"""

import json
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import ray
import ray.train

from pipelines.config.clip_recipes import RECIPES
from pipelines.config.command_line import parse_recipe, told_shortly
from pipelines.config.recipe import ClassificationRecipe, TrimmedDataConfig
from pipelines.core.clock import duration
from pipelines.core.cluster import init_ray
from pipelines.core.models import fetch_weights, require_weights
from pipelines.core.resources import check_resources
from pipelines.core.storage import BACKBONE_FILE, absolute, join, replacing
from pipelines.core.tracking import Run, finishing, log_dataset, log_text, tracking_uri
from pipelines.data.clip_plan import Lists, make_plan, read_lists
from pipelines.data.toy import toy_clips
from pipelines.train import fit
from pipelines.training.checkpoints import DETECTOR_FOLDER
from pipelines.training.classification import ClassificationTask, build_classifier
from pipelines.training.model import remarks
from pipelines.training.results import log_model
from pipelines.training.resuming import resume_or_start
from re2tal.backbones.weights import save_backbone_weights
from re2tal.datasets.toy import UNFINISHED
from re2tal.errors import UserError
from re2tal.trained import load_detector


def parse(arguments: list[str]) -> ClassificationRecipe:
    """Reads a recipe's name and overrides of its fields from the command line.

    Args:
        arguments: without the program's name.
    """
    recipe: ClassificationRecipe = parse_recipe(
        arguments,
        RECIPES,
        ClassificationRecipe,
        script="finetune_backbone.py",
        description=__doc__ or "",
    )
    return recipe


def _make_toy(data: TrimmedDataConfig) -> None:
    """Makes the toy clips if they are not there, or were not finished."""
    if not data.make_toy or data.training is None or "://" in data.training:
        return
    training = Path(data.training).absolute()
    if not training.exists() or (training.parent / UNFINISHED).exists():
        print(f"making the toy data set's trimmed split in {training.parent}", flush=True)
        toy_clips(training.parent)


def prepared(recipe: ClassificationRecipe) -> ClassificationRecipe:
    """Returns the recipe with absolute paths, because workers run elsewhere; makes the toy data.

    Args:
        recipe: as the user gave it.

    Raises:
        UserError: if there are no weights at their path.
    """
    data, model = recipe.data, recipe.model
    _make_toy(data)
    weights = require_weights(model.weights)
    data = replace(
        data,
        training=data.training and absolute(data.training),
        validation=data.validation and absolute(data.validation),
        videos=data.videos and absolute(data.videos),
        classes=data.classes and absolute(data.classes),
    )
    return replace(
        recipe,
        data=data,
        model=replace(model, weights=weights),
        output=absolute(recipe.output),
    )


def check_model(recipe: ClassificationRecipe, lists: Lists) -> None:
    """Builds the classifier once, so that what does not fit stops the run before it starts.

    Args:
        recipe: with absolute paths.
        lists: with the classes.

    Raises:
        UserError: if the weights cannot be read or are another network's.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = tracking_uri(recipe.output)
        try:
            weights = fetch_weights(recipe.model.weights, Path(folder), tracking_uri=store)
            build_classifier(recipe, lists.classes, weights)
        except ValueError as problem:
            raise UserError(str(problem)) from problem


def log_backbone(recipe: ClassificationRecipe, run: Run, result: ray.train.Result) -> str:
    """Writes the backbone's weights, and logs them and the classifier in MLflow.

    Args:
        recipe: the run's configuration.
        run: where to.
        result: of the training; its last checkpoint holds the averaged classifier.

    Returns:
        Where the weights are, a path or URI.
    """
    assert result.checkpoint is not None, "every epoch reports a checkpoint"
    weights = join(recipe.output, join(run.run_id, BACKBONE_FILE))
    reached = _reached(run)
    facts = {"run": run.run_id, "command": shlex.join(sys.argv), **reached}
    with result.checkpoint.as_directory() as folder, tempfile.TemporaryDirectory() as scratch:
        _, classifier = load_detector(Path(folder) / DETECTOR_FOLDER)
        path = Path(scratch) / BACKBONE_FILE
        save_backbone_weights(classifier.backbone, path, {"re2tal": json.dumps(facts)})
        uri = log_model(run, Path(folder) / DETECTOR_FOLDER, backbone=path)
        run.client.log_artifact(run.run_id, str(path))
        for place in (weights, recipe.weights_file):
            if place is not None:
                with replacing(absolute(place)) as stream:
                    stream.write(path.read_bytes())
    run.client.set_tag(run.run_id, "model.uri", uri)
    return weights


def _reached(run: Run) -> dict[str, float]:
    """What the final test measured."""
    metrics = run.client.get_run(run.run_id).data.metrics
    return {name: value for name, value in metrics.items() if name.startswith("test/")}


def print_summary(
    recipe: ClassificationRecipe, run: Run, weights: str, *, failed: int, seconds: float
) -> None:
    """Prints what a run reached, what it took, and where it is.

    Args:
        recipe: the configuration.
        run: with its metrics sent; what did not arrive is not printed.
        weights: path or URI of the backbone's weights.
        failed: number of videos that were left out.
        seconds: from the command's start to its end.
    """
    views = recipe.views
    for name, value in _reached(run).items():
        kind = name.removeprefix("test/").replace("_", " ")
        print(f"{kind:<20}{value:.3f} ({views.clips} clips x {views.crops} crops)")
    uri = run.client.get_run(run.run_id).data.tags["model.uri"]
    for label, fact in (
        ("time", f"{duration(seconds)} in all"),
        *([("left out", f"{failed} videos")] if failed else []),
        ("MLflow run", f"{run.run_id} in {run.uri}"),
        ("weights", recipe.weights_file or weights),
        ("or", f"runs:/{run.run_id}/{BACKBONE_FILE}"),
        ("or", uri),
    ):
        print(f"{label:<20}{fact}")


def finetune(recipe: ClassificationRecipe) -> Run:
    """Runs a recipe from its videos to the backbone's weights.

    Args:
        recipe: the configuration.

    Returns:
        The MLflow run.
    """
    began = time.perf_counter()
    recipe = prepared(recipe)
    lists = read_lists(recipe.data)
    check_model(recipe, lists)
    init_ray(trains=True)
    check_resources(recipe.scale)
    for remark in remarks(recipe, ray.nodes()):
        print(f"warning: {remark}", flush=True)
    plan = make_plan(recipe.data, lists)
    run, goes_on = resume_or_start(recipe, plan)
    if goes_on:
        print(f"going on with the unfinished run {run.run_id}; --no-resume starts anew", flush=True)
    with finishing(run):
        log_dataset(
            run, name=recipe.name, source=str(recipe.data.training), digest=plan.fingerprint
        )
        left_out = [f"{video_id}: {reason}" for video_id, reason in sorted(plan.failures.items())]
        log_text(run, left_out, "data/unusable_videos.txt")
        result = fit(ClassificationTask(recipe=recipe, plan=plan), run)
        weights = log_backbone(recipe, run, result)
    print_summary(
        recipe, run, weights, failed=len(plan.failures), seconds=time.perf_counter() - began
    )
    return run


if __name__ == "__main__":
    with told_shortly():
        finetune(parse(sys.argv[1:]))
