"""Search of suppression and voting on a run's raw detections, without training."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from optuna.samplers import TPESampler

from pipelines.config.recipe import Recipe
from pipelines.core.metric_log import log_metrics
from pipelines.core.metric_names import MAP
from pipelines.core.progress import doing
from pipelines.core.storage import fetch
from pipelines.core.tracking import Run, finishing, recipe_of, start_run
from pipelines.data.inputs import resolved
from pipelines.data.plan import Plan, evaluation_plan, read_annotations, read_video_scores
from pipelines.training.detection import RAW_FILE, DetectionTask
from re2tal.detection.raw import read_raw
from re2tal.detection.segments import Detections
from re2tal.detection.suppression import nms_videos
from re2tal.errors import UserError, apart
from sweeps.suggestions import Suggestions, override
from sweeps.trial import log_searched


@dataclass(frozen=True, kw_only=True, slots=True)
class Postprocessing:
    """Result of a search.

    Attributes:
        values: best values for fields of the recipe, by dotted name.
        before: average mAP with the recipe's own values.
        after: average mAP with `values`; never lower.
        run: the search's run in MLflow.
    """

    values: dict[str, Any]
    before: float
    after: float
    run: Run

    @property
    def options(self) -> list[str]:
        """Values as options of `train.py`."""
        words = []
        for name, value in self.values.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return words


def space(suggest: Suggestions) -> None:
    """Ask for the settings of non-maximum suppression and of voting."""
    method = suggest.choice("nms.method", ("soft", "hard"))
    if method == "soft":
        suggest.log_float("nms.sigma", 0.05, 2.0)
    elif method == "hard":
        suggest.number("nms.iou", 0.1, 0.9)
    if suggest.choice("nms.voting", ("none", "score", "score_tiou")) != "none":
        suggest.number("nms.voting_iou", 0.5, 0.95)


def search_postprocessing(run: Run, *, trials: int, seed: int, parent: str) -> Postprocessing:
    """Search the post-processing of a run's detections, in a separate MLflow run.

    Args:
        run: run that kept its raw detections.
        trials: number of trials, including the recipe's own settings.
        seed: seed of the search.
        parent: id of the MLflow run to which the search belongs.

    Raises:
        UserError: the run kept no raw detections, or these or its annotations cannot be read.
    """
    recipe = recipe_of(run)
    with tempfile.TemporaryDirectory() as folder:
        uri = f"runs:/{run.run_id}/{RAW_FILE}"
        what = "Raw detections, which a run keeps with --save-raw"
        path = fetch(uri, Path(folder), tracking_uri=run.uri, what=what)
        raw, _ = read_raw(path)
    plan = _plan(recipe, raw)
    tags = {MLFLOW_PARENT_RUN_ID: parent, MLFLOW_RUN_NAME: f"{recipe.name} post-processing"}
    tracked = start_run(recipe, output=recipe.output, tags=tags)
    with finishing(tracked):
        study = _search(recipe, plan, raw, trials=trials, seed=seed)
        best = study.best_trial
        before, after = study.trials[0].value or 0.0, best.value or 0.0
        log_searched(tracked, best.params)
        log_metrics(tracked, {"base/val/mAP": before, MAP: after}, step=0)
        for number, trial in enumerate(study.trials):
            log_metrics(tracked, {"sweep/mAP": trial.value or 0.0}, step=number)
    values = best.user_attrs["values"]
    return Postprocessing(values=values, before=before, after=after, run=tracked)


def _search(
    recipe: Recipe, plan: Plan, raw: Mapping[str, Detections], *, trials: int, seed: int
) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=TPESampler(seed=seed))
    own = Suggestions(recipe)
    space(own)
    study.enqueue_trial(own.base_point)

    def quality(trial: optuna.Trial) -> float:
        suggestions = Suggestions(recipe, trial)
        space(suggestions)
        trial.set_user_attr("values", suggestions.values)
        changed = override(recipe, suggestions.values)
        task = DetectionTask(recipe=changed, plan=plan)
        _, metrics = task.judged(nms_videos(raw, changed.nms))
        return metrics[MAP]

    with doing("searching the post-processing, without training") as count:
        study.optimize(
            quality,
            n_trials=trials,
            callbacks=[lambda study, _: count(len(study.get_trials(deepcopy=False)), trials)],
        )
    return study


def _plan(recipe: Recipe, raw: Mapping[str, Detections]) -> Plan:
    """Plan the validation videos that have detections, without their files."""
    data = resolved(recipe.data, needed=("annotations",), prefix="--data.")
    annotations = read_annotations(data)
    annotated = annotations.subset(data.evaluated_on).videos
    videos = [video for video in annotated if video.video_id in raw]
    if not videos:
        raise UserError(
            f"The run's raw detections cover none of the {len(annotated)} videos of "
            f"{data.annotations}, which must have changed since: restore the annotations of the "
            f"run. {apart(raw, [video.video_id for video in annotated])}."
        )
    scores = read_video_scores(data, annotations.classes, videos)
    return evaluation_plan(annotations, videos, scores)
