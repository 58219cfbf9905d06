"""Evaluates detections, or a trained detector, against annotations.

A file of detections, as detect.py and training write it (ActivityNet's results JSON); no video is
needed:

  python pipelines/evaluate.py --detections detections.json --annotations A --dataset thumos-14

A detector: the folder of a checkpoint, or a run or model in MLflow. It detects in the videos first:

  python pipelines/evaluate.py --model RUN_ID --annotations A --videos FOLDER

(--import MODULE_OR_FILE first imports the module of a backbone or localizer of your own.)

Prints average precision of every class at every tIoU, average recall by the number of proposals,
and a diagnosis of the errors in short. All of it goes to MLflow, and to --output: tables as CSV and
in evaluation.json, pictures, and a detector's detections. Detections of the one class "action" are
proposals: --video-scores gives them classes, else they are evaluated whatever the class.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import ray
import tyro

from pipelines.config.choices import import_own
from pipelines.config.command_line import told_shortly
from pipelines.config.recipe import Dataset
from pipelines.core.cluster import init_ray
from pipelines.core.models import local_detector
from pipelines.core.storage import local_copy, require
from pipelines.core.tracking import (
    Run,
    finishing,
    log_metrics,
    log_text,
    start_run,
    tracking_uri,
)
from pipelines.data.plan import Plan, check_failures, evaluation_plan, load_files, read_video_scores
from pipelines.inference.detecting import Resources
from pipelines.inference.evaluating import (
    Sources,
    check_classes,
    detect_all,
    sources_of,
    write_evaluation,
)
from pipelines.inference.evaluation import (
    USUAL_THRESHOLDS,
    Labelled,
    evaluate,
    metrics_of,
    print_evaluation,
    read_labelled,
)
from pipelines.training.detection import DETECTIONS_FILE
from re2tal.datasets import Form
from re2tal.detection.evaluation.tables import checked_levels
from re2tal.errors import UserError
from re2tal.trained import read_spec


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What to evaluate, and against what.

    Attributes:
        detections: file of detections; a path or a URI, or runs:/RUN/detections.json in MLflow.
            Either this or a model.
        model: folder of a saved detector or of a checkpoint; or, in MLflow, the id of a training
            run, runs:/RUN/NAME or models:/NAME/VERSION.
        annotations: ActivityNet-style JSON, or one of the other forms that
            `re2tal.datasets` reads; a path or a URI.
        form: how the annotations are laid out; "auto" looks at them.
        dataset: what is known to be wrong in this data set is repaired, and its usual thresholds
            and bins are taken; by default any fault in the annotations is an error.
        exclude: file with ids of videos to leave out: one a line, or JSON.
        keep: ids of videos that count although `dataset` leaves them out.
        videos: for a model, folder of the video files, named by id, or of shards; a path or a URI.
        subset: name of the subset that is evaluated.
        thresholds: tIoU thresholds of the mAP; by default those of the data set, or 0.3 to 0.7.
        ignore_ambiguous: detections on stretches that cannot be judged count for nothing, as in
            THUMOS-14's own toolkit.
        video_scores: for proposals, what an external classifier says of the videos
            (`re2tal.detection.video_scores`); a path or a URI.
        video_scores_top: of each video so many of these classes are given to each proposal.
        video_scores_logits: the file holds logits (HACS), of which a softmax makes scores.
        max_failed: stop when more than this share of the videos cannot be decoded.
        output: folder of tables and pictures.
        resources: what a model runs on.
        experiment: MLflow experiment.
        runs: folder of the default MLflow store; MLFLOW_TRACKING_URI names another store.
    """

    detections: str | None = None
    model: str | None = None
    annotations: str | None = None
    form: Form = "auto"
    dataset: Dataset | None = None
    exclude: str | None = None
    keep: tuple[str, ...] = ()
    videos: str | None = None
    subset: str = "validation"
    thresholds: tuple[float, ...] | None = None
    ignore_ambiguous: bool = False
    video_scores: str | None = None
    video_scores_top: int = 2
    video_scores_logits: bool = False
    max_failed: float = 0.05
    output: str = "evaluation"
    resources: tyro.conf.OmitArgPrefixes[Resources] = field(default_factory=Resources)
    experiment: str = "re2tal"
    runs: str = "runs"

    @property
    def name(self) -> str:
        """Of the run in MLflow."""
        return "evaluate"

    @property
    def levels(self) -> tuple[float, ...]:
        """The tIoU thresholds."""
        return self.thresholds or USUAL_THRESHOLDS[self.dataset]


def parse(arguments: Sequence[str]) -> EvaluateConfig:
    """Reads the command line.

    Args:
        arguments: without the program's name.
    """
    return tyro.cli(
        EvaluateConfig, args=import_own(arguments), prog="evaluate.py", description=__doc__
    )


def evaluate_run(config: EvaluateConfig) -> Run:
    """Evaluates, prints and logs.

    Args:
        config: what, and against what.

    Returns:
        The MLflow run.

    Raises:
        UserError: if something is not there.
        AnnotationError: with every problem in the annotations.
        FileError: with every problem in the detections or video scores.
        UserError: if settings contradict one another; if there is nothing to find, or too many
            videos cannot be decoded; if the videos lie in shards that are not complete; if the
            cluster is too small.
    """
    if (config.detections is None) == (config.model is None):
        raise UserError("Say what to evaluate: either --detections FILE or --model MODEL.")
    _check_levels(config.levels)
    plan = evaluated_plan(config)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        store = tracking_uri(Path(config.runs).absolute())
        if config.detections is not None:
            place = require(config.detections, what="The detections", option="--detections")
            file = local_copy(place, scratch, tracking_uri=store)
            read = read_labelled(file, plan, top=config.video_scores_top)
            return _tracked(config, plan, lambda: read)
        model = local_detector(config.model, scratch, tracking=store, option="--model")
        spec = read_spec(model)
        check_classes(spec, plan.classes)
        sources = sources_of(config.videos, plan, spec)
        return _tracked(config, plan, lambda: _detected(config, plan, model, sources))


def _check_levels(levels: Sequence[float]) -> None:
    try:
        checked_levels(levels)
    except ValueError as error:
        raise UserError(f"{error} Correct --thresholds.") from error


def evaluated_plan(config: EvaluateConfig) -> Plan:
    """The annotated videos of the subset, with video scores; where their files are is not asked.

    Args:
        config: what to evaluate against.

    Raises:
        UserError: as
            `evaluate_run`.
    """
    annotations = load_files(
        config.annotations,
        form=config.form,
        dataset=config.dataset,
        exclude=config.exclude,
        keep=config.keep,
        prefix="--",
    )
    videos = annotations.subset(config.subset).videos
    if not any(video.evaluated for video in videos):
        raise UserError(
            f"No instance to evaluate detections against in subset {config.subset!r}: its "
            f"{len(videos)} videos have none. Name a subset with annotated actions (--subset)."
        )
    scores = read_video_scores(
        config.video_scores,
        annotations.classes,
        videos,
        top=config.video_scores_top,
        logits=config.video_scores_logits,
        prefix="--",
    )
    return evaluation_plan(annotations, videos, scores)


def _detected(config: EvaluateConfig, plan: Plan, model: Path, sources: Sources) -> Labelled:
    """Runs the detector; videos of which nothing can be decoded are left out."""
    total = len(plan.validation)
    check_failures(sources.failures, total, config.max_failed, prefix="--")
    if not ray.is_initialized():  # it is in a notebook that uses it already
        init_ray()
    output = Path(config.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    file = output / DETECTIONS_FILE
    found = detect_all(model, sources, plan, config.resources, file, progress=_show_progress)
    check_failures(found.failures, total, config.max_failed, prefix="--")
    usable = tuple(v for v in plan.validation if v.annotation.video_id not in found.failures)
    labelled = read_labelled(
        file,
        replace(plan, validation=usable, failures=found.failures),
        top=config.video_scores_top,
    )
    left_out = tuple(f"{name} is left out: {why}" for name, why in found.failures.items())
    return replace(labelled, remarks=(*found.remarks, *left_out, *labelled.remarks))


def _show_progress(done: int, total: int) -> None:
    if done % max(1, total // 20) == 0 or done == total:
        print(f"  {done} of {total} windows", flush=True)


def _tracked(config: EvaluateConfig, plan: Plan, source: Callable[[], Labelled]) -> Run:
    """Evaluates what the source has, in a run of MLflow."""
    output = Path(config.output).absolute()
    tags = {"data.fingerprint": plan.fingerprint}
    run = start_run(config, output=Path(config.runs).absolute(), tags=tags)
    with finishing(run):
        labelled = source()
        evaluation = evaluate(
            labelled,
            config.levels,
            ignore_ambiguous=config.ignore_ambiguous,
            dataset=config.dataset,
        )
        for remark in labelled.remarks:
            print(f"remark: {remark}")
        title = f"{config.detections or config.model}: average precision, {config.subset}"
        print_evaluation(evaluation, title=title)
        written = write_evaluation(output, evaluation, labelled)
        if config.model is not None:
            written.append(Path(DETECTIONS_FILE))
        log_metrics(run, metrics_of(evaluation), step=0)
        log_text(run, labelled.remarks, "remarks.txt")
        for path in written:
            folder = None if path.parent == Path() else str(path.parent)
            run.client.log_artifact(run.run_id, str(output / path), folder)
    print(f"tables and pictures  {output}")
    print(f"MLflow run           {run.run_id} in {run.uri}")
    return run


if __name__ == "__main__":
    with told_shortly(
        failure="the detector failed; with less memory it may go through: lower --batch-size.",
    ):
        evaluate_run(parse(sys.argv[1:]))
