"""Results of a finished run: checkpoints as models, pictures, a table."""

import json
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pipelines.config.recipe import Recipe
from pipelines.core.clock import duration
from pipelines.core.figures import Timeline, curves, drawn, timelines
from pipelines.core.figures import pictures as diagnosis_pictures
from pipelines.core.metric_names import BEST_MAP, EPOCH, MAP, VALIDATION_LOSS, WATCHED_MAP
from pipelines.core.models import MODEL_TAG
from pipelines.core.storage import crc32, database_file, require_room, sizes_below
from pipelines.core.tracking import DIGEST, Run
from pipelines.data.plan import Plan
from pipelines.training.checkpoints import DETECTOR_FOLDER
from pipelines.training.detection import DETECTIONS_FILE, RAW_FILE
from pipelines.training.model import reported_classes
from pipelines.training.validation import ground_truth, overfitting
from re2tal.annotations import Characteristics
from re2tal.detection.diagnosis import Diagnosis, diagnose, tables
from re2tal.detection.files import read_detections, rows
from re2tal.detection.segments import Detections
from re2tal.errors import count_of
from re2tal.trained import WEIGHTS_FILE

_SHOWN_VIDEOS = 4
_SHOWN_SCORE = 0.2  # detections below it are left out of pictures, if there are enough others
_CONTENT = "re2tal.weights_crc32"  # tag of a model
_REPOSITORY = Path(__file__).parents[2]


def _history(run: Run, name: str) -> list[tuple[int, float]]:
    # evaluations beside the training may end in another order than their epochs
    return sorted((m.step, m.value) for m in run.client.get_metric_history(run.run_id, name))


def log_model(
    run: Run,
    detector: Path,
    *,
    metrics: Mapping[str, float] | None = None,
    evaluated_on: str = "",
    **files: Path,
) -> str:
    """Log a saved detector as an MLflow model, with the code that loads it in any process.

    The model is named after its run and its epoch, and has the metrics that it reached, by which
    MLflow ranks models. If a resumed run has logged it before, that model is returned. Incomplete
    models, which killed processes left, are removed.

    Args:
        run: run of the model.
        detector: folder that `save_detector` wrote.
        metrics: metrics of its checkpoint, with its epoch and step.
        evaluated_on: name of the data that it was evaluated on.
        files: further files of the model, by name.

    Returns:
        The model's URI.

    Raises:
        UserError: if there is no room for it.
    """
    import mlflow  # takes seconds, which evaluate.py --help need not wait for
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.utils.file_utils import local_file_uri_to_path

    content = crc32(str(detector / WEIGHTS_FILE))
    client, its_run = run.client, run.client.get_run(run.run_id)
    experiment = its_run.info.experiment_id
    reached = dict(metrics or {})
    epoch, step = int(reached.get(EPOCH, 0)), int(reached.get("step", 0))
    for model in client.search_logged_models(
        [experiment], filter_string=f"source_run_id = '{run.run_id}'"
    ):
        if model.status != LoggedModelStatus.READY:
            client.delete_logged_model(model.model_id)
        elif model.tags.get(_CONTENT) == content:
            return str(model.model_uri)
    artifacts = its_run.info.artifact_uri
    if artifacts.startswith("file:"):
        wanted = sum(sizes_below(str(detector)).values())
        require_room(local_file_uri_to_path(artifacts), wanted, what="the model")
    # created before its files are logged, which makes it READY
    made = client.create_logged_model(
        experiment,
        name=re.sub(r"""[/:.%"'`]""", "_", name_of_model(its_run.info.run_name, epoch)),
        source_run_id=run.run_id,
        params={"epoch": str(epoch), **its_run.data.params},
        tags={_CONTENT: content},
        model_type="detector",
    )
    client.log_outputs(run.run_id, [LoggedModelOutput(made.model_id, step=step)])
    data = (evaluated_on, its_run.data.tags.get("data.fingerprint", "")[:DIGEST])
    _link_metrics(run, made.model_id, reached, step=step, data=data if evaluated_on else None)
    mlflow.set_tracking_uri(run.uri)
    with warnings.catch_warnings():
        # an example would be a video file of the user's; the type hints say what is needed
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType")
        info = mlflow.pyfunc.log_model(
            model_id=made.model_id,
            python_model=str(_REPOSITORY / "pipelines" / "core" / "mlflow_model.py"),
            # as URIs: MLflow decodes %41 in paths too
            artifacts={
                name: path.as_uri() for name, path in {"detector": detector, **files}.items()
            },
            code_paths=[str(_REPOSITORY / "re2tal")],
            pip_requirements=["torch", "torchvision", "av", "pydantic", "safetensors", "psutil"],
        )
    uri: str = info.model_uri
    return uri


def _link_metrics(
    run: Run,
    model_id: str,
    metrics: Mapping[str, float],
    *,
    step: int,
    data: tuple[str, str] | None,
) -> None:
    """Link metrics that the run has at a checkpoint's step to a model and to a data set.

    Args:
        run: run of the model.
        model_id: the model.
        metrics: metrics of the checkpoint.
        step: step at which the run logged them.
        data: name and digest of the data, as `log_dataset` gives them.
    """
    from mlflow.entities import Metric

    name, digest = data or (None, None)
    elsewhere = (WATCHED_MAP, EPOCH)  # not measured on these data
    # with the run's own timestamps; with others, the run would list each metric twice
    linked = [
        Metric(
            one.key,
            one.value,
            one.timestamp,
            one.step,
            model_id=model_id,
            dataset_name=None if metric in elsewhere else name,
            dataset_digest=None if metric in elsewhere else digest,
        )
        for metric in metrics
        for one in run.client.get_metric_history(run.run_id, metric)
        if one.step == step
    ]
    run.client.log_batch(run.run_id, metrics=linked)


def register(run: Run, model_uri: str, name: str) -> None:
    """Register a run's model as the next version of a name, unless it is registered there."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    client = run.client
    try:
        client.create_registered_model(name)
    except MlflowException as problem:
        if problem.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if not any(v.source == model_uri for v in client.search_model_versions(f"name = '{name}'")):
        model_id = model_uri.removeprefix("models:/")
        version = client.create_model_version(name, model_uri, run.run_id, model_id=model_id)
        # an MLflow server sets this tag itself; the client of a local database does not
        known = client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]")
        made = {"name": name, "version": version.version}
        if made not in (versions := json.loads(known)):
            tag = {MLFLOW_MODEL_VERSIONS: json.dumps([*versions, made])}
            client.set_logged_model_tags(model_id, tag)
        print(f"registered as       models:/{name}/{version.version}", flush=True)


def log_pictures(run: Run, plan: Plan, detections: Mapping[str, Detections]) -> None:
    """Log the training curves, and timelines of some validation videos.

    Args:
        run: run whose metrics are drawn; if none arrived in MLflow, the curves are left out.
        plan: classes and validation videos.
        detections: detections of the best checkpoint, in seconds.
    """
    client = run.client
    prefix = "val/mAP/tiou_"
    names = sorted(
        name for name in client.get_run(run.run_id).data.metrics if name.startswith(prefix)
    )
    quality = {name.removeprefix(prefix): _history(run, name) for name in names}
    quality["average"] = _history(run, "val/mAP")
    loss = _history(run, "train/loss")
    if loss and quality["average"]:
        more = {"validation_loss": _history(run, VALIDATION_LOSS)}
        more["watched"] = _history(run, WATCHED_MAP)
        client.log_figure(run.run_id, curves(loss, quality, **more), "pictures/curves.png")
    figure = timelines_of(plan, detections)
    with drawn():
        client.log_figure(run.run_id, figure, "pictures/timelines.png")


def name_of_model(run: str, epoch: int) -> str:
    """Name a model after its run, with the epoch before the time, as lists truncate long names."""
    return re.sub(r"(-\d{8}-\d{6})?$", rf"-epoch-{epoch}\1", run, count=1)


def timelines_of(plan: Plan, detections: Mapping[str, Detections]) -> Figure:
    """Draw detections, in seconds, and annotated instances of some validation videos."""
    shown = [video.annotation for video in plan.validation[:_SHOWN_VIDEOS]]
    found = [detections.get(known.video_id, Detections.empty()) for known in shown]
    # as many as there are instances: after a short training all scores are low
    scores = torch.cat([of_video.scores for of_video in found]).sort(descending=True).values
    wanted = min(sum(len(known.evaluated) for known in shown), len(scores))
    least = min(_SHOWN_SCORE, float(scores[wanted - 1])) if wanted else _SHOWN_SCORE
    videos = {
        known.video_id: Timeline(
            duration=known.duration,
            found=rows(of_video[of_video.scores >= least], plan.classes),
            truth=known.evaluated,
            least=least,
        )
        for known, of_video in zip(shown, found, strict=True)
    }
    return timelines(videos, plan.classes)


def diagnosis_of(
    plan: Plan,
    detections: Mapping[str, Detections],
    *,
    thresholds: Sequence[float],
    bins: Characteristics,
) -> Diagnosis:
    """Diagnose detections: types of errors, sensitivity to properties of actions, missed actions.

    Args:
        plan: classes and validation videos.
        detections: detections in seconds.
        thresholds: tIoU thresholds.
        bins: bins of the actions' characteristics.
    """
    return diagnose(
        ground_truth(plan.validation, plan.classes),
        detections,
        {v.annotation.video_id: v.annotation.duration for v in plan.validation},
        num_classes=len(plan.classes),
        thresholds=thresholds,
        characteristics=bins,
    )


def log_diagnosis(run: Run, diagnosis: Diagnosis) -> None:
    """Log the pictures of a diagnosis, and its numbers in `diagnosis/<table>.json`."""
    for name, table in tables(diagnosis).items():
        run.client.log_dict(run.run_id, {"rows": table}, f"diagnosis/{name}.json")
    for name, figure in diagnosis_pictures(diagnosis).items():
        run.client.log_figure(run.run_id, figure, f"pictures/diagnosis_{name}.png")


def log_results(
    recipe: Recipe, plan: Plan, run: Run, checkpoint: Path, metrics: Mapping[str, float]
) -> None:
    """Log the best checkpoint as a model, its detections, pictures and the diagnosis of its errors.

    Args:
        recipe: configuration of the run.
        plan: classes and videos of the run.
        run: MLflow run that receives the results.
        checkpoint: folder of the best checkpoint.
        metrics: metrics that it reached.
    """
    plan = plan.restricted(reported_classes(recipe, plan.classes))
    client = run.client
    with tempfile.TemporaryDirectory() as scratch:
        client.log_artifact(run.run_id, str(checkpoint / DETECTIONS_FILE))
        detections = read_detections(checkpoint / DETECTIONS_FILE, plan.classes)
        failures = Path(scratch) / "unusable_videos.json"
        failures.write_text(json.dumps(dict(plan.failures), indent=2))
        client.log_artifact(run.run_id, str(failures))
        if recipe.save_raw:
            client.log_artifact(run.run_id, str(checkpoint / RAW_FILE))
        on = recipe.data.subsets["validation"]
        uri = log_model(run, checkpoint / DETECTOR_FOLDER, metrics=metrics, evaluated_on=on)
        client.set_tag(run.run_id, MODEL_TAG, uri)
    if recipe.registered_model is not None:
        register(run, uri, recipe.registered_model)
    client.set_tag(run.run_id, BEST_MAP, str(metrics[MAP]))
    client.set_tag(run.run_id, "best.epoch", str(int(metrics[EPOCH])))
    log_pictures(run, plan, detections)
    diagnosis = diagnosis_of(
        plan, detections, thresholds=recipe.thresholds, bins=recipe.data.record.bins
    )
    log_diagnosis(run, diagnosis)


def _open_command(run: Run) -> str:
    return shlex.join(
        [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--backend-store-uri", run.uri]
    )


def page_of(run: Run) -> str:
    """Return the address of a run's page in MLflow, once `_open_command` runs for a local store.

    The page opens in the mode for model training; MLflow's default is that for language models.
    """
    server = "http://127.0.0.1:5000" if database_file(run.uri) is not None else run.uri
    experiment = run.client.get_run(run.run_id).info.experiment_id
    place = f"experiments/{experiment}/runs/{run.run_id}?workflowType=machine_learning"
    return f"{server.rstrip('/')}/#/{place}"


def print_summary(recipe: Recipe, plan: Plan, run: Run, *, seconds: float) -> None:
    """Print the quality of a run, its time and memory, and its place in MLflow.

    Args:
        recipe: configuration of the run.
        plan: its plan, with the videos that were left out.
        run: run whose metrics are printed, as far as they arrived in MLflow.
        seconds: seconds from the command's start to its end.
    """
    averages = _history(run, "val/mAP")
    if averages:
        console = Console(width=max(80, Console().width))
        console.print(_quality(recipe, run, averages))
        step, average = max(averages, key=lambda point: point[1])
        if sentence := overfitting(dict(_history(run, WATCHED_MAP)).get(step), average):
            print(sentence)
    else:
        print(f"No mAP arrived in MLflow: metrics that were not sent are in {recipe.output}.")
    for label, value in _facts(plan, run, seconds):
        print(f"{label:<20}{value}")


def _quality(recipe: Recipe, run: Run, averages: Sequence[tuple[int, float]]) -> Table:
    """Tabulate the mAP of the best epoch."""
    step, average = max(averages, key=lambda point: point[1])
    epoch = dict(_history(run, EPOCH)).get(step)
    # without its number: the run was begun by an earlier version, or the number was not sent
    place = f"step {step}" if epoch is None else f"epoch {epoch:.0f} of {recipe.epochs}"
    table = Table(title=f"{recipe.name}: mAP of {place}, the best")
    values = []
    for threshold in recipe.thresholds:
        table.add_column(f"tIoU {threshold:.2f}", justify="right")
        value = dict(_history(run, f"val/mAP/tiou_{threshold:.2f}")).get(step)
        values.append("" if value is None else f"{value:.3f}")
    table.add_column("average", justify="right")
    table.add_row(*values, f"[bold]{average:.3f}")
    return table


def _facts(plan: Plan, run: Run, seconds: float) -> Iterator[tuple[str, str]]:
    metrics = run.client.get_run(run.run_id).data.metrics
    yield "time", f"{duration(seconds)} in all"
    if {"train/frames_per_second", "train/data_wait_share"} <= metrics.keys():
        speed, waiting = metrics["train/frames_per_second"], metrics["train/data_wait_share"]
        yield "speed", f"{speed:.0f} frames/s, {waiting:.0%} of the time waiting for data"
    for label, name, what in (
        ("GPU memory", "memory/cuda_peak_mb", "at the peak of a worker's step"),
        ("host memory", "memory/rss_peak_mb", "at the peak of a worker's step"),
        ("activations", "memory/predicted_activations_mb", "a worker (predicted)"),
    ):
        if name in metrics:
            yield label, f"{metrics[name]:.0f} MB {what}"
    if plan.failures:
        listed = ", ".join(f"{video_id} ({why})" for video_id, why in sorted(plan.failures.items()))
        yield "left out", f"{count_of(len(plan.failures), 'video')}: {listed}"
    yield "MLflow run", f"{run.run_id} in {run.uri}"
    if database_file(run.uri) is not None:
        yield "open it", _open_command(run)
    yield "its page", page_of(run)
