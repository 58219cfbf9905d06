"""Run of a recipe, from its data to its results in MLflow: checks, Ray Train, results."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from ray.train.torch import TorchTrainer

from pipelines.config.clip_recipes import AnyRecipe, ClassificationRecipe, finetuning
from pipelines.config.recipe import FinetuneConfig, Recipe
from pipelines.core.checkout import script_command, this_command
from pipelines.core.clock import duration
from pipelines.core.cluster import start_ray
from pipelines.core.metric_log import log_metrics
from pipelines.core.metric_names import BEST_MAP, EPOCH, MAP
from pipelines.core.models import MODEL_TAG, with_weights_here
from pipelines.core.progress import ProgressPrinter, doing
from pipelines.core.resources import check_resources, free_gpu_memory
from pipelines.core.stopping import stoppable
from pipelines.core.storage import BACKBONE_FILE, file_sizes, join, replacing, require_room
from pipelines.core.tracking import (
    Run,
    finishing,
    log_dataset,
    log_recipe,
    log_text,
    start_run,
    take_up,
    tracking_uri,
)
from pipelines.core.underway import alone
from pipelines.data.clip_plan import AnyPlan, read_lists
from pipelines.data.clip_plan import make_plan as make_clip_plan
from pipelines.data.feature_stream import without_backbone
from pipelines.data.features import Features
from pipelines.data.inputs import classification_inputs, detection_inputs
from pipelines.data.plan import Plan, evaluation_plan, make_plan, read_annotations
from pipelines.data.videos import probe_files
from pipelines.training.activations import activation_metrics
from pipelines.training.beside import Evaluations
from pipelines.training.checkpoints import DETECTOR_FOLDER
from pipelines.training.classification import ClassificationTask, build_classifier
from pipelines.training.detection import DetectionTask
from pipelines.training.entry import train_worker
from pipelines.training.fitting import AUTO, budget_of, fit_recipe, text_of
from pipelines.training.layouts import explicit_command
from pipelines.training.model import build_detector, load_localizer, remarks
from pipelines.training.results import log_model, log_results, print_summary
from pipelines.training.resuming import (
    ASKED,
    asked_to_fit,
    digest,
    last_run,
    layout_so_far,
    layout_tag,
    mark,
    resume_or_start,
)
from pipelines.training.retention import (
    best_checkpoint,
    drop_list,
    newest_checkpoint,
    remove_surplus,
    scored_checkpoints,
)
from pipelines.training.trainer import Task
from pipelines.training.worker import Job, TrainingProblem
from re2tal.annotations import Annotations
from re2tal.backbones.weights import save_backbone_weights
from re2tal.datasets import summarize
from re2tal.detector import Detector
from re2tal.errors import UserError
from re2tal.trained import load_detector
from re2tal.weights import WeightsReport

ModelT = TypeVar("ModelT")
RecipeT = TypeVar("RecipeT", bound=AnyRecipe)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Run of a detector that can start.

    Attributes:
        recipe: configuration with absolute paths.
        annotations: annotations of the data set.
        plan: classes and videos of the run.
        tags: tags of its run: the size of memory that it was fitted to, and the layout.
        fitting: lines of text on the layouts that were considered.
    """

    recipe: Recipe
    annotations: Annotations
    plan: Plan
    tags: Mapping[str, str] = field(default_factory=dict)
    fitting: Sequence[str] = ()


def train(recipe: Recipe, *, fit: str | None = None, parent: str | None = None) -> Run:
    """Train a detector, from its data to its results in MLflow.

    If the backbone is finetuned first, finetuning and training are child runs of one run, which is
    returned.

    Args:
        recipe: the configuration as the user gave it.
        fit: size of memory that the step is laid out for, or "auto"; None keeps the recipe's
            layout. A finetuning before the training always keeps its own.
        parent: id of the parent run in MLflow.

    Raises:
        UserError: if something is missing or does not fit.
    """
    if recipe.finetune.epochs:
        return _finetune_and_train(recipe, fit)
    began = time.perf_counter()
    with stoppable(_nothing_yet):
        ready, detector = prepare(recipe, fit=fit)
        run = _resumed(ready.recipe, ready.plan, parent=parent, tags=ready.tags)
    with stoppable(partial(_kept, ready.recipe, run)):
        train_run(ready, run, detector=detector)
    print_summary(ready.recipe, ready.plan, run, seconds=time.perf_counter() - began)
    return run


def _finetune_and_train(recipe: Recipe, fit: str | None) -> Run:
    """Finetune the backbone on the annotated segments, and then train the detector end to end."""
    if recipe.data.features:
        raise UserError(
            "--finetune-epochs trains the backbone, but --data.features replace it: leave one of "
            "them out."
        )
    with stoppable(_nothing_yet):
        recipe = detection_inputs(recipe)
        try:
            first = finetuning(recipe)
        except ValueError as problem:
            raise UserError(str(problem)) from problem
        annotations = read_annotations(recipe.data)
        # errors of the second run are to be found before the first one has run
        check_model(recipe, annotations.classes)
        _start_ray(recipe)
        _opened(recipe, annotations)
        parent = _parent(recipe, evaluation_plan(annotations, (), None))
    with finishing(parent):
        log_recipe(parent, recipe)
        log_dataset(
            parent,
            source=str(recipe.data.annotations),
            digest=annotations.fingerprint,
            subsets=recipe.data.subsets,
        )
        weights = _finetuned(recipe, parent)
        if weights is None:
            print(f"1 of 2: finetuning the backbone for {first.epochs} epochs", flush=True)
            run = finetune(first, parent=parent.run_id)
            weights = join(join(recipe.output, run.run_id), BACKBONE_FILE)
        print("2 of 2: training end to end from the finetuned backbone", flush=True)
        model = replace(recipe.model, weights=weights, coupling_epochs=None)
        second = replace(recipe, finetune=FinetuneConfig(), model=model)
        run = train(second, fit=fit, parent=parent.run_id)
        tags = run.client.get_run(run.run_id).data.tags
        for tag in (MODEL_TAG, BEST_MAP, "best.epoch"):
            parent.client.set_tag(parent.run_id, tag, tags[tag])
        log_metrics(parent, {MAP: float(tags[BEST_MAP])}, step=0)
    return parent


def _parent(recipe: Recipe, plan: Plan) -> Run:
    """Go on with the unfinished run that holds both steps, or start one."""
    output = recipe.output
    tags = mark(recipe, digest(recipe, plan), output=output)
    with alone(output):  # of two equal commands, the second sees the first one's run
        run = last_run(recipe, tags, output=output) if recipe.resume else None
        if run is None or run.client.get_run(run.run_id).info.status == "FINISHED":
            return start_run(recipe, output=output, tags=tags)
        take_up(run, output=output)
    print(f"going on with the unfinished run {run.run_id}; --no-resume starts anew", flush=True)
    return run


def _finetuned(recipe: Recipe, parent: Run) -> str | None:
    """Return the path or URI of the finetuned weights, if the finetuning has finished."""
    experiment = parent.client.get_run(parent.run_id).info.experiment_id
    found = parent.client.search_runs(
        [experiment],
        filter_string=f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.run_id}'"
        " and attributes.status = 'FINISHED'",
    )
    folders = (join(recipe.output, run.info.run_id) for run in found)
    return next((join(f, BACKBONE_FILE) for f in folders if BACKBONE_FILE in file_sizes(f)), None)


def prepare(recipe: Recipe, *, fit: str | None = None) -> tuple[Prepared, Detector[Any, Any]]:
    """Check everything that can be checked before a run, and start or join Ray.

    Args:
        recipe: the configuration as the user gave it.
        fit: see `train`.

    Returns:
        The run, and its detector as `check_model` built it.

    Raises:
        UserError: if something is missing or does not fit.
    """
    if recipe.finetune.epochs:
        raise UserError(
            "--finetune-epochs belongs to train.py: leave it out (--finetune.epochs 0, in a sweep "
            "--base.finetune.epochs 0). To begin with a finetuned backbone, finetune it once "
            "before (finetune_backbone.py --data.annotations A --data.videos V), and give its "
            "weights."
        )
    recipe = detection_inputs(recipe)
    annotations = read_annotations(recipe.data)
    tags: dict[str, str] = {}
    fitting: list[str] = []
    if fit is not None:
        recipe, tags, fitting = _laid_out(recipe, fit, annotations.classes)
    if recipe.data.features:
        recipe = without_backbone(recipe, Features(recipe.data.features))
    with doing("building the model and loading its weights"):
        detector = check_model(recipe, annotations.classes)
    _start_ray(recipe, frames=not recipe.data.features)
    plan = _opened(recipe, annotations)
    if plan.remarks:
        print(f"{len(plan.remarks)} remarks on the videos, for example:")
        print(f"  {plan.remarks[0]}", flush=True)
    ready = Prepared(recipe=recipe, annotations=annotations, plan=plan, tags=tags, fitting=fitting)
    return ready, detector


def _opened(recipe: Recipe, annotations: Annotations) -> Plan:
    """Make the plan of a run, which opens all videos or features."""
    with doing(f"opening the {'features' if recipe.data.features else 'videos'}") as count:
        return make_plan(recipe.data, annotations, probe=partial(probe_files, progress=count))


def _laid_out(
    recipe: Recipe, size: str, classes: Sequence[str]
) -> tuple[Recipe, dict[str, str], list[str]]:
    """Lay out a recipe's step for a size of memory, or as an unfinished run of the command did.

    Returns:
        The recipe, tags of its run, and lines on the considered layouts, which are also printed.

    Raises:
        UserError: if no layout fits, or if the size is not known.
    """
    tags = {"fit": size, ASKED: asked_to_fit(recipe, size)}
    layout = layout_so_far(recipe, tags[ASKED])
    if layout is not None:
        print(f"--fit {size}: the unfinished run of this command keeps its layout", flush=True)
        return layout.applied(recipe), tags, []
    if size == AUTO and os.environ.get("RAY_ADDRESS"):
        start_ray(trains=True)  # the GPUs are those of its nodes
    found = fit_recipe(
        recipe,
        budget_of(size, recipe, free_gpu_memory),
        classes=classes,
        say=lambda line: print(line, flush=True),
    )
    script = script_command("pipelines/train.py")
    command = explicit_command(script, sys.argv[1:], found.layout, recipe)
    lines = [*text_of(found.rows()), *found.remarks, f"The same explicitly: {command}"]
    print("\n".join(lines), flush=True)
    return found.recipe, tags | layout_tag(found.layout), lines


def check_model(recipe: Recipe, classes: Sequence[str]) -> Detector[Any, Any]:
    """Build the detector once, so that a model that does not fit stops the run before it starts.

    Args:
        recipe: configuration with absolute paths.
        classes: names of the action classes.

    Raises:
        UserError: if settings contradict one another; if the weights cannot be read or belong to
            another network.
    """
    if recipe.data.video_scores and not recipe.model.class_agnostic:
        raise UserError(
            "--data.video-scores gives proposals their classes, but this model tells the classes "
            "apart itself: leave the scores out, or train it with --model.class-agnostic."
        )
    detector, report = _built(recipe, lambda here: _begun(here, classes))
    if report is not None:
        print(f"weights of the localizer: {report.summary}", flush=True)
    frames = recipe.data.window.frames
    if frames % detector.multiple:
        raise UserError(
            f"--data.window.frames must be a multiple of {detector.multiple} for this backbone and "
            f"localizer, but is {frames}."
        )
    return detector


def _begun(
    recipe: Recipe, classes: Sequence[str]
) -> tuple[Detector[Any, Any], WeightsReport | None]:
    """Build the detector, with the initial weights of its localizer."""
    detector = build_detector(recipe, classes, recipe.model.weights)
    return detector, load_localizer(detector, recipe.model)


def _built(recipe: RecipeT, build: Callable[[RecipeT], ModelT]) -> ModelT:
    """Build a model from the recipe with its weights on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        store = tracking_uri(recipe.output)
        try:
            return build(with_weights_here(recipe, Path(folder), tracking_uri=store))
        except ValueError as problem:
            raise UserError(str(problem)) from problem


def _start_ray(recipe: AnyRecipe, *, frames: bool = True) -> None:
    """Start or join Ray; check that the cluster can hold the run and the output a checkpoint."""
    require_room(recipe.output, 0, what="a checkpoint")
    start_ray(trains=True)
    check_resources(recipe.scale)
    for remark in remarks(recipe, ray.nodes()) if frames else []:
        print(f"warning: {remark}", flush=True)


def _resumed(
    recipe: AnyRecipe,
    plan: AnyPlan,
    *,
    parent: str | None,
    tags: Mapping[str, str] | None = None,
) -> Run:
    """Go on with the unfinished run of a configuration, or start one."""
    run, goes_on = resume_or_start(recipe, plan, parent=parent, tags=tags)
    if goes_on:
        print(f"going on with the unfinished run {run.run_id}; --no-resume starts anew", flush=True)
    return run


def _nothing_yet() -> str:
    return "nothing was trained yet: give the same command again"


def _kept(recipe: AnyRecipe, run: Run) -> str:
    """Return a message: the checkpoint from which a stopped run goes on."""
    newest = newest_checkpoint(join(recipe.output, run.run_id))
    if newest is None:
        return f"run {run.run_id} had no checkpoint yet: the same command begins anew"
    return f"kept: {newest.uri}\nthe same command goes on from there"


def train_run(
    ready: Prepared,
    run: Run,
    *,
    detector: Detector[Any, Any] | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
    threads: int | None = None,
) -> None:
    """Train, and log the data, the metrics and the results in MLflow.

    Args:
        ready: run that can start.
        run: MLflow run that receives the results and is ended.
        detector: detector, if it is already built and has its weights.
        callbacks: callbacks of Ray Train, which receive the report of each epoch.
        threads: number of PyTorch's threads in each worker, as in `Job`.
    """
    recipe, plan = ready.recipe, ready.plan
    with finishing(run):
        if detector is None:
            detector = check_model(recipe, plan.classes)
        log_recipe(run, recipe)
        log_dataset(
            run,
            source=str(recipe.data.annotations),
            digest=plan.fingerprint,
            subsets=recipe.data.subsets,
        )
        log_text(run, [summarize(ready.annotations)], "data/summary.txt")
        log_text(run, plan.remarks, "data/remarks.txt")
        log_text(run, ready.fitting, "fit.txt")
        if plan.features is None:
            log_metrics(run, activation_metrics(recipe, detector), step=0, again=False)
        task = DetectionTask(recipe=recipe, plan=plan)
        output = fit(task, run, callbacks=callbacks, threads=threads)
        ranked = scored_checkpoints(output, task.score, say=print)
        for place, (folder, metrics) in enumerate(ranked):
            if place == 0:
                log_results(recipe, plan, run, folder, metrics)
            else:
                on = recipe.data.subsets["validation"]
                log_model(run, folder / DETECTOR_FOLDER, metrics=metrics, evaluated_on=on)


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Trainer that leaves SIGINT to `stoppable`, as Ray Train's own handler waits silently."""

    _controller: Any = None
    _stopped = False

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller
        if self._stopped:
            self.stop()

    def stop(self) -> None:
        """Make `fit` raise, and end the workers at once, also on a cluster that keeps running."""
        self._stopped = True
        if self._controller is not None:
            ray.kill(self._controller)

    def fit(self) -> ray.train.Result:
        """Train until the end, a signal or `stop`."""
        try:
            return super().fit()
        except SystemExit:
            self.stop()
            raise


def fit(
    task: Task,
    run: Run,
    *,
    callbacks: Sequence[ray.train.UserCallback] = (),
    threads: int | None = None,
) -> str:
    """Train on the cluster and show progress until it ends.

    Args:
        task: task whose recipe has absolute paths.
        run: MLflow run that receives metrics.
        callbacks: see `train_run`.
        threads: see `train_run`.

    Returns:
        Folder of the run's checkpoints, a path or URI.

    Raises:
        UserError: if the workers met a problem that another attempt would meet again.
    """
    recipe, scale = task.recipe, task.recipe.scale
    output = join(recipe.output, run.run_id)
    if scale.validation_workers and callbacks:
        raise UserError(
            "--scale.validation-workers must be 0 for a trial: trials are compared by the metrics "
            "of each epoch, which must be known when the epoch ends."
        )
    drop_list(output)
    workers = f"{scale.workers} worker{'s' * (scale.workers > 1)}"
    print(f"starting {workers}, which load the model and wait for the first windows", flush=True)
    with ProgressPrinter() as progress:
        job = Job(
            task=task,
            run=run,
            output=output,
            board=progress.board,
            threads=threads,
        )
        trainer = _Trainer(
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
                callbacks=list(callbacks),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )
        with Evaluations(job, stop=trainer.stop) as evaluations:
            problem = trainer.fit().return_value
            if isinstance(problem, TrainingProblem):
                raise UserError(problem.message)
            evaluations.finish()
    remove_surplus(output, recipe.checkpoints, task.score)  # also where nothing was left to train
    return output


def finetune(recipe: ClassificationRecipe, *, parent: str | None = None) -> Run:
    """Finetune a backbone, from its videos to its weights in MLflow.

    Args:
        recipe: the configuration as the user gave it.
        parent: id of the parent run in MLflow.

    Raises:
        UserError: if something is missing or does not fit.
    """
    began = time.perf_counter()
    with stoppable(_nothing_yet):
        recipe = classification_inputs(recipe)
        lists = read_lists(recipe.data)
        with doing("building the model and loading its weights"):
            _built(recipe, lambda here: build_classifier(here, lists.classes, here.model.weights))
        _start_ray(recipe)
        with doing("opening the videos") as count:
            plan = make_clip_plan(recipe.data, lists, probe=partial(probe_files, progress=count))
        run = _resumed(recipe, plan, parent=parent)
    with stoppable(partial(_kept, recipe, run)), finishing(run):
        log_dataset(
            run,
            source=str(recipe.data.annotations or recipe.data.training),
            digest=plan.fingerprint,
            subsets=recipe.data.subsets,
        )
        left_out = [f"{video_id}: {reason}" for video_id, reason in sorted(plan.failures.items())]
        log_text(run, left_out, "data/unusable_videos.txt")
        output = fit(ClassificationTask(recipe=recipe, plan=plan), run)
        # the result is the last epoch's, whatever its accuracy
        with best_checkpoint(output, EPOCH, say=print) as (folder, metrics):
            weights = _log_backbone(recipe, run, folder, metrics)
    seconds = time.perf_counter() - began
    _print_weights(recipe, run, weights, failed=len(plan.failures), seconds=seconds)
    return run


def _log_backbone(
    recipe: ClassificationRecipe, run: Run, checkpoint: Path, metrics: Mapping[str, float]
) -> str:
    """Write the backbone's weights of the last checkpoint, and log them with the classifier.

    Returns:
        Path or URI of the weights, which are those of the averaged classifier.

    Raises:
        UserError: if the last epoch's checkpoint is damaged.
    """
    if metrics.get(EPOCH, recipe.epochs) < recipe.epochs:
        raise UserError(
            "The checkpoint of the last epoch is damaged. Give the same command again: the run "
            "goes on from the one before it."
        )
    weights = join(recipe.output, join(run.run_id, BACKBONE_FILE))
    facts = {"run": run.run_id, "command": this_command(), **_reached(run)}
    with tempfile.TemporaryDirectory() as scratch:
        _, classifier = load_detector(checkpoint / DETECTOR_FOLDER)
        path = Path(scratch) / BACKBONE_FILE
        save_backbone_weights(classifier.backbone, path, {"re2tal": json.dumps(facts)})
        uri = log_model(run, checkpoint / DETECTOR_FOLDER, metrics=metrics, backbone=path)
        run.client.log_artifact(run.run_id, str(path))
        for place in (weights, recipe.weights_file):
            if place is not None:
                with replacing(place) as stream:
                    stream.write(path.read_bytes())
    run.client.set_tag(run.run_id, MODEL_TAG, uri)
    return weights


def _reached(run: Run) -> dict[str, float]:
    """Return the metrics of the final test, as far as they arrived in MLflow."""
    metrics = run.client.get_run(run.run_id).data.metrics
    return {name: value for name, value in metrics.items() if name.startswith("test/")}


def _print_weights(
    recipe: ClassificationRecipe, run: Run, weights: str, *, failed: int, seconds: float
) -> None:
    """Print the quality of a run, its time and memory, and the place of its weights."""
    views = recipe.views
    for name, value in _reached(run).items():
        kind = name.removeprefix("test/").replace("_", " ")
        print(f"{kind:<20}{value:.3f} ({views.clips} clips x {views.crops} crops)")
    uri = run.client.get_run(run.run_id).data.tags[MODEL_TAG]
    for label, fact in (
        ("time", f"{duration(seconds)} in all"),
        *([("left out", f"{failed} {recipe.data.counted}")] if failed else []),
        ("MLflow run", f"{run.run_id} in {run.uri}"),
        ("weights", recipe.weights_file or weights),
        ("or", f"runs:/{run.run_id}/{BACKBONE_FILE}"),
        ("or", uri),
    ):
        print(f"{label:<20}{fact}")
