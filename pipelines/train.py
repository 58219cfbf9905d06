"""Trains a detector end to end, from video files to segments, and tracks the run in MLflow.

The toy data set, minutes on two CPU cores:

  python pipelines/train.py

Another recipe, on data of yours:

  python pipelines/train.py RECIPE --data.annotations A --data.videos FOLDER --model.weights W

The same without videos and backbone, on features (extract_features.py):

  python pipelines/train.py RECIPE --data.annotations A --data.features FEATURES

Any field of a recipe, by its dotted name; a backbone, by its own:

  python pipelines/train.py toy --epochs 3 --optim.backbone-lr 1e-4
  python pipelines/train.py toy --model.backbone slowfast_toy --model.weights None

A recipe of your own, without touching this repository (pipelines/README.md):

  python pipelines/train.py my_recipe.py

What an earlier run trained, such as the best trial of a sweep (sweeps/), with other values for
some fields:

  python pipelines/train.py --from-run RUN_ID --epochs 12
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import ray.train
from ray.train.torch import TorchTrainer

from pipelines.config.choices import import_own, take
from pipelines.config.command_line import parse_recipe, told_shortly
from pipelines.config.recipe import CheckpointConfig, Recipe
from pipelines.config.recipes import RECIPES
from pipelines.core.cluster import init_ray
from pipelines.core.models import require_weights, with_weights_here
from pipelines.core.progress import ProgressPrinter
from pipelines.core.resources import check_resources
from pipelines.core.storage import absolute as absolute_path
from pipelines.core.storage import join, require
from pipelines.core.tracking import (
    Run,
    finishing,
    log_dataset,
    log_metrics,
    log_recipe,
    log_text,
    recipe_of,
    tracking_uri,
)
from pipelines.data.feature_stream import without_backbone
from pipelines.data.features import Features
from pipelines.data.plan import Plan, make_plan, read_annotations
from pipelines.data.toy import toy_videos
from pipelines.training.activations import activation_metrics
from pipelines.training.detection import DetectionTask
from pipelines.training.entry import train_worker
from pipelines.training.model import build_detector, load_localizer, remarks
from pipelines.training.results import log_results, print_summary
from pipelines.training.resuming import newest_checkpoint, resume_or_start
from pipelines.training.trainer import Task
from pipelines.training.worker import Job, TrainingProblem
from re2tal.annotations import Annotations
from re2tal.datasets import summarize
from re2tal.detector import Detector
from re2tal.errors import UserError


def parse(arguments: Sequence[str]) -> Recipe:
    """Read a recipe's name and overrides of its fields from the command line.

    Args:
        arguments: without the program's name.

    Raises:
        UserError: there is no such recipe, backbone or module, or the run whose configuration is
            asked for cannot be had.
    """
    run_ids, rest = take("--from-run", import_own(arguments))
    recipes = RECIPES
    if run_ids:
        output = absolute_path((take("--output", rest)[0] or ["runs"])[-1])
        earlier = recipe_of(Run(uri=tracking_uri(output), run_id=run_ids[-1]))

        def run() -> Recipe:
            """Configuration of an earlier run."""
            return earlier

        recipes, rest = {"run": run}, ["run", *rest]
    recipe: Recipe = parse_recipe(
        rest, recipes, Recipe, script="train.py", description=__doc__ or ""
    )
    return recipe


def _show_remarks(plan: Plan) -> None:
    if plan.remarks:
        print(f"{len(plan.remarks)} remarks on the videos, for example:")
        print(f"  {plan.remarks[0]}", flush=True)


def absolute(recipe: Recipe) -> Recipe:
    """Returns the recipe with absolute paths, because workers run elsewhere; makes the toy data.

    Args:
        recipe: as the user gave it.

    Raises:
        UserError: if a path is missing.
    """
    data, model = recipe.data, recipe.model
    if data.make_toy and data.annotations and not Path(data.annotations).exists():
        folder = Path(data.annotations).absolute().parent
        print(f"making the toy data set in {folder}", flush=True)
        toy_videos(folder)
    weights = require_weights(model.weights)
    of_localizer = require_weights(
        model.localizer_weights,
        option="--model.localizer-weights",
        what="The localizer's weights",
    )
    data = replace(
        data,
        annotations=require(data.annotations, what="The annotations", option="--data.annotations"),
    )
    if data.features is None:
        videos = require(data.videos, what="The videos", option="--data.videos")
        data = replace(data, videos=videos)
    else:
        features = require(data.features, what="The features", option="--data.features")
        data = replace(data, features=features)
    return replace(
        recipe,
        data=data,
        model=replace(model, weights=weights, localizer_weights=of_localizer),
        output=absolute_path(recipe.output),
    )


def check_model(recipe: Recipe, classes: Sequence[str]) -> Detector:
    """Builds the detector once, so that what does not fit stops the run before it starts.

    Args:
        recipe: with absolute paths.
        classes: names of the action classes.

    Raises:
        UserError: if settings contradict one another; if the weights cannot be read or are another
            network's.
    """
    if recipe.data.video_scores and not recipe.model.class_agnostic:
        raise UserError(
            "--data.video-scores gives proposals their classes, but this model tells the classes "
            "apart itself: leave the scores out, or train it with --model.class-agnostic."
        )
    with tempfile.TemporaryDirectory() as folder:
        store = tracking_uri(recipe.output)
        recipe = with_weights_here(recipe, Path(folder), tracking_uri=store)
        try:
            detector = build_detector(recipe, classes, recipe.model.weights)
            report = load_localizer(detector, recipe.model)
        except ValueError as problem:
            raise UserError(str(problem)) from problem
    if report is not None:
        print(f"weights of the localizer: {report.summary}", flush=True)
    return detector


def _kept(config: CheckpointConfig, score: str) -> ray.train.CheckpointConfig:
    """Ray Train keeps the newest in any case, to go on from."""
    if config.which == "last":
        return ray.train.CheckpointConfig(num_to_keep=config.keep)
    return ray.train.CheckpointConfig(
        num_to_keep=config.keep,
        checkpoint_score_attribute=score,
        checkpoint_score_order="max",
    )


def fit(
    task: Task,
    run: Run,
    *,
    callbacks: Sequence[ray.train.UserCallback] = (),
    threads: int | None = None,
) -> ray.train.Result:
    """Trains on the cluster and shows progress until it ends.

    Args:
        task: what is trained; the paths of its recipe are absolute.
        run: where metrics go.
        callbacks: of Ray Train, which see what each epoch reports.
        threads: of each worker's PyTorch, as in `Job`.

    Returns:
        Ray's result, with the kept checkpoints.
    """
    recipe, scale = task.recipe, task.recipe.scale
    with ProgressPrinter() as progress:
        output = join(recipe.output, run.run_id)
        job = Job(
            task=task,
            run=run,
            output=output,
            board=progress.board,
            checkpoint=newest_checkpoint(output),
            threads=threads,
        )
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": ray.put(job)},
            scaling_config=ray.train.ScalingConfig(
                num_workers=(
                    scale.workers
                    if scale.min_workers is None
                    else (scale.min_workers, scale.workers)
                ),
                elastic_resize_monitor_interval_s=scale.resize_seconds,
                use_gpu=scale.gpu,
                resources_per_worker={"CPU": scale.cpus_per_worker}
                | ({"GPU": 1} if scale.gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name=run.run_id,
                storage_path=recipe.output,
                failure_config=ray.train.FailureConfig(
                    max_failures=scale.max_failures, controller_failure_limit=2
                ),
                checkpoint_config=_kept(recipe.checkpoints, task.score),
                callbacks=list(callbacks),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )
        result = trainer.fit()
    problem = result.return_value
    if isinstance(problem, TrainingProblem):
        raise UserError(problem.message)
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A run that can start.

    Attributes:
        recipe: with absolute paths.
        annotations: of the data set.
        plan: what it works on.
    """

    recipe: Recipe
    annotations: Annotations
    plan: Plan


def prepare(recipe: Recipe) -> tuple[Prepared, Detector]:
    """Checks all that can be checked before a run, and starts or joins Ray.

    Args:
        recipe: as the user gave it.

    Returns:
        What can start, and its detector as `check_model` built it.

    Raises:
        UserError: if something is missing or does not fit.
    """
    recipe = absolute(recipe)
    annotations = read_annotations(recipe.data)
    if recipe.data.features:
        recipe = without_backbone(recipe, Features(recipe.data.features))
    detector = check_model(recipe, annotations.classes)
    init_ray(trains=True)
    check_resources(recipe.scale)
    for remark in [] if recipe.data.features else remarks(recipe, ray.nodes()):
        print(f"warning: {remark}", flush=True)
    plan = make_plan(recipe.data, annotations)
    _show_remarks(plan)
    return Prepared(recipe=recipe, annotations=annotations, plan=plan), detector


def train_run(
    ready: Prepared,
    run: Run,
    *,
    detector: Detector | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
    threads: int | None = None,
) -> None:
    """Trains, and puts into MLflow what it is trained on, how it went, and what came out.

    Args:
        ready: what is trained.
        run: where to; it is ended.
        detector: if it was built already, and its weights fetched.
        callbacks: of Ray Train, which see what each epoch reports.
        threads: of each worker's PyTorch, as in `Job`.
    """
    recipe, plan = ready.recipe, ready.plan
    with finishing(run):
        if detector is None:
            detector = check_model(recipe, plan.classes)
        log_recipe(run, recipe)
        log_dataset(
            run, name=recipe.name, source=str(recipe.data.annotations), digest=plan.fingerprint
        )
        log_text(run, [summarize(ready.annotations)], "data/summary.txt")
        log_text(run, plan.remarks, "data/remarks.txt")
        if plan.features is None:
            log_metrics(run, activation_metrics(recipe, detector), step=0)
        task = DetectionTask(recipe=recipe, plan=plan)
        result = fit(task, run, callbacks=callbacks, threads=threads)
        log_results(recipe, plan, run, result)


def train(recipe: Recipe) -> Run:
    """Runs a recipe from its data to its results in MLflow.

    Args:
        recipe: the configuration.

    Returns:
        The MLflow run.
    """
    began = time.perf_counter()
    ready, detector = prepare(recipe)
    run, goes_on = resume_or_start(ready.recipe, ready.plan)
    if goes_on:
        print(f"going on with the unfinished run {run.run_id}; --no-resume starts anew", flush=True)
    train_run(ready, run, detector=detector)
    print_summary(ready.recipe, ready.plan, run, seconds=time.perf_counter() - began)
    return run


if __name__ == "__main__":
    with told_shortly():
        train(parse(sys.argv[1:]))
