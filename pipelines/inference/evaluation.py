"""Evaluation of detections, or of a trained detector, against annotations."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pipelines.core.cluster import start_ray
from pipelines.core.metric_log import log_metrics
from pipelines.core.models import local_detector
from pipelines.core.storage import local_copy
from pipelines.core.tracking import Run, finishing, log_text, start_run, tracking_uri
from pipelines.data.inputs import resolved
from pipelines.data.plan import (
    ACTION,
    Plan,
    check_failures,
    evaluation_plan,
    read_annotations,
    read_video_scores,
)
from pipelines.data.videos import FoundVideos, find_videos
from pipelines.inference.detecting import detect_videos
from pipelines.inference.options import EvaluateConfig
from pipelines.inference.report import (
    Labelled,
    evaluate,
    logged,
    print_evaluation,
    write_evaluation,
)
from pipelines.training.detection import DETECTIONS_FILE, RAW_FILE
from re2tal.annotations import as_named
from re2tal.detection.evaluation.matching import checked_levels
from re2tal.detection.files import read_detections, write_detections
from re2tal.detection.raw import ensemble, read_raw
from re2tal.detection.segments import Detections
from re2tal.detection.suppression import nms_videos
from re2tal.detection.video_scores import fuse_videos
from re2tal.errors import UserError, apart, count_of, shortened
from re2tal.trained import read_spec

_RAW = Path(RAW_FILE).suffix


def evaluate_run(config: EvaluateConfig) -> Run:
    """Evaluate, then print, write and log the metrics; return the MLflow run.

    Raises:
        UserError: if an input does not exist; if settings contradict one another; if there is no
            annotated action, or too many videos cannot be decoded; if the videos lie in incomplete
            shards; if the cluster is too small.
        AnnotationError: with every problem in the annotations.
        FileError: with every problem in the detections or video scores.
    """
    if bool(config.detections) == bool(config.model):
        raise UserError("Say what to evaluate: either --detections FILE or --model MODEL.")
    try:
        checked_levels(config.levels)
    except ValueError as error:
        raise UserError(f"{error} Correct --thresholds.") from error
    if any(k < 1 for k in config.ks):
        raise UserError(f"Recall@kx needs every k to be at least 1, not {config.ks} (--recall-at).")
    config = resolved(
        config,
        needed=("annotations", "detections" if config.detections else "videos"),
    )
    plan = evaluated_plan(config)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        store = tracking_uri(Path(config.runs).absolute())
        if config.detections:
            read = read_labelled(_local(config.detections, scratch, store), plan, config)
            return _tracked(config, plan, lambda: read)
        model = local_detector(config.model, scratch, tracking=store, option="--model")
        spec = read_spec(model)
        _check_classes(spec.classes, plan.classes, "the detector", option="--model")
        sources = find_videos(
            str(config.videos),
            [video.annotation.video_id for video in plan.validation],
            fingerprint=plan.fingerprint,
            size=spec.size,
            fps=spec.window.fps,
        )
        return _tracked(config, plan, lambda: _detected(config, plan, model, sources))


def evaluated_plan(config: EvaluateConfig) -> Plan:
    """Plan the evaluation of the subset, with video scores; it needs no video files.

    Raises:
        UserError: see `evaluate_run`, whose other errors may be raised too.
    """
    annotations = read_annotations(config)
    videos = annotations.subset(config.evaluated_on, option="--subset").videos
    if not any(video.evaluated for video in videos):
        raise UserError(
            f"No instance to evaluate detections against in subset {config.evaluated_on!r}: its "
            f"{len(videos)} videos have none. Name a subset with annotated actions (--subset)."
        )
    scores = read_video_scores(config, annotations.classes, videos, prefix="--")
    return evaluation_plan(annotations, videos, scores)


def _tracked(config: EvaluateConfig, plan: Plan, source: Callable[[], Labelled]) -> Run:
    """Evaluate the detections that `source` returns, in an MLflow run."""
    output = Path(config.output).absolute()
    tags = {"data.fingerprint": plan.fingerprint}
    run = start_run(config, output=Path(config.runs).absolute(), tags=tags, once=True)
    with finishing(run):
        labelled = source()
        evaluation = evaluate(
            labelled,
            config.levels,
            ks=config.ks,
            bins=config.record.bins,
            ignore_ambiguous=config.ignore_ambiguous,
        )
        for remark in labelled.remarks:
            print(f"remark: {remark}")
        for warning in labelled.warnings:  # last, right above the table
            print(f"warning: {warning}")
        evaluated = " + ".join(config.detections) or config.model
        title = f"{evaluated}: average precision, {config.evaluated_on}"
        print_evaluation(evaluation, title=title)
        written = write_evaluation(output, evaluation, labelled)
        if config.model is not None:
            written.append(Path(DETECTIONS_FILE))
        log_metrics(run, logged(evaluation), step=0)
        log_text(run, [*labelled.remarks, *labelled.warnings], "remarks.txt")
        for path in written:
            folder = None if path.parent == Path() else str(path.parent)
            run.client.log_artifact(run.run_id, str(output / path), folder)
    print(f"tables and pictures  {output}")
    print(f"MLflow run           {run.run_id} in {run.uri}")
    return run


# --- given detections -----------------------------------------------------------------------------


def _local(places: Sequence[str], scratch: Path, store: str) -> list[Path]:
    """Return local paths of files of detections; each copy gets its own folder."""
    paths = []
    for number, place in enumerate(places):
        (folder := scratch / str(number)).mkdir()
        paths.append(local_copy(place, folder, tracking_uri=store))
    return paths


def read_labelled(paths: Sequence[Path], plan: Plan, config: EvaluateConfig) -> Labelled:
    """Read the detections of the plan's videos, and leave out those of other videos.

    Args:
        paths: one JSON file in ActivityNet's format, or files of raw detections, with the classes
            of the plan or the one class `ACTION`.
        plan: videos and classes, and the video scores if there are any.
        config: ensemble and suppression of raw detections, and number of classes of a proposal.

    Raises:
        FileError: with every problem in a file.
        UserError: if the files have no video of the plan; if an ensemble includes detections after
            suppression, or runs that do not match; if proposals and detections with classes are
            mixed, or there are video scores although detections have classes.
    """
    names = plan.classes if ACTION in plan.classes else (*plan.classes, ACTION)
    evaluated = {video.annotation.video_id for video in plan.validation}
    if any(path.suffix == _RAW for path in paths) or len(paths) > 1:
        found = _thinned(paths, names, evaluated, config)
    else:
        found = read_detections(paths[0], names)
    found = as_named(found, evaluated)
    where = " and ".join(map(str, paths))
    proposals = {video_id: one for video_id, one in found.items() if video_id in evaluated}
    if not proposals:
        raise UserError(
            f"None of the {len(found)} videos of {where} is in the subset "
            f"{config.evaluated_on!r} of {config.annotations}. Do the ids match? "
            f"{apart(found, evaluated)}. Correct --detections, --annotations or --subset."
        )
    labelled = Labelled(
        plan=plan,
        detections=proposals,
        proposals=proposals,
        remarks=tuple(_remarks(found, proposals, evaluated)),
        warnings=tuple(_warnings(proposals, evaluated, config.evaluated_on)),
    )
    if not _agnostic(proposals, names, plan.classes, where):
        if plan.video_scores is not None:
            raise UserError(
                f"--video-scores gives proposals their classes, but the detections in {where} have "
                "classes already: leave the scores out."
            )
        return labelled
    if plan.video_scores is not None:
        fused = fuse_videos(proposals, plan.video_scores, top=config.video_scores_top)
        return replace(labelled, detections=fused)
    # proposals without classes: the plan is reduced to the class `ACTION`, whose label is 0
    whatever = {
        video_id: replace(one, labels=torch.zeros_like(one.labels))
        for video_id, one in proposals.items()
    }
    return replace(
        labelled, plan=plan.restricted((ACTION,)), detections=whatever, proposals=whatever
    )


def _thinned(
    paths: Sequence[Path], names: Sequence[str], evaluated: set[str], config: EvaluateConfig
) -> dict[str, Detections]:
    """Merge raw detections of one run or an ensemble, and suppress overlapping ones.

    Videos that are not evaluated have empty detections, so that remarks can count them.
    """
    if thin := [path.name for path in paths if path.suffix != _RAW]:
        raise UserError(
            f"An ensemble needs detections before non-maximum suppression, but "
            f"{', '.join(thin)} holds detections after it: give the {RAW_FILE} of every run "
            "(train.py --save-raw), or evaluate the files one by one."
        )
    weights = config.weights or (1.0,) * len(paths)
    runs = []
    for path in paths:
        raw, classes = read_raw(path)
        _check_classes(classes, names, str(path), option="--detections")
        number = torch.tensor([names.index(name) for name in classes], dtype=torch.int64)
        runs.append({v: replace(one, labels=number[one.labels]) for v, one in raw.items()})
    others = dict.fromkeys(v for run in runs for v in run if v not in evaluated)
    try:
        whole = ensemble([{v: run[v] for v in run if v in evaluated} for run in runs], weights)
    except ValueError as error:
        raise UserError(f"{error} Correct --detections or --weights.") from error
    # scores in an ensemble are weighted shares of a run's: the threshold shrinks with them
    share = min(weights) / sum(weights)
    nms = replace(config.nms, min_score=config.nms.min_score * share)
    return nms_videos(whole, nms) | dict.fromkeys(others, Detections.empty())


def _check_classes(found: Sequence[str], known: Sequence[str], what: str, *, option: str) -> None:
    """Raise if there are classes that the annotations do not have."""
    unknown = sorted(set(found) - set(known) - {ACTION})
    if unknown:
        raise UserError(
            f"{len(unknown)} of the {len(found)} classes of {what} are not in the annotations "
            f"({', '.join(shortened(unknown, 5))}): are they from another data set? Correct "
            f"{option} or --annotations."
        )


def _agnostic(
    proposals: Mapping[str, Detections], names: Sequence[str], classes: Sequence[str], where: str
) -> bool:
    """Tell whether all detections have the class `ACTION`, which the annotations do not have."""
    labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(p.labels for p in proposals.values())])
    without = labels == names.index(ACTION)
    if ACTION in classes or not without.any():
        return False
    if not without.all():
        raise UserError(
            f"{int(without.sum())} of the {len(labels)} detections in {where} are proposals, with "
            f"the class {ACTION!r}; the others have classes of the annotations. Evaluate the two "
            "kinds separately."
        )
    return True


def _remarks(
    found: Mapping[str, Detections], kept: Mapping[str, Detections], evaluated: set[str]
) -> list[str]:
    """Report the videos that only the file or only the subset has."""
    remarks = []
    if left_out := len(found) - len(kept):
        remarks.append(
            f"detections of {count_of(left_out, 'video')} outside the subset are left out"
        )
    if missing := sorted(evaluated - kept.keys()):
        listed = ", ".join(shortened(missing, 5))
        remarks.append(
            f"no detections in {count_of(len(missing), 'video')} of the subset ({listed})"
        )
    return remarks


_FEW = 0.5  # share of a subset's videos: detectors find nothing in some videos, rarely in most


def _warnings(kept: Mapping[str, Detections], evaluated: set[str], subset: str) -> Iterator[str]:
    """Warn that metrics say little about a detector if most videos are not in the file."""
    if len(kept) < _FEW * len(evaluated):
        yield (
            f"only {len(kept)} of the {len(evaluated)} videos of the subset {subset!r} have "
            "detections: all actions of the others count as missed"
        )


# --- detections from a given detector -------------------------------------------------------------


def _detected(config: EvaluateConfig, plan: Plan, model: Path, sources: FoundVideos) -> Labelled:
    """Run the detector; videos without a decodable window are left out."""
    total = len(plan.validation)
    check_failures(sources.failures, total, config.max_failed, prefix="--")
    start_ray()
    output = Path(config.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    durations = {v.annotation.video_id: v.annotation.duration for v in plan.validation}
    known = {video_id: durations[video_id] for video_id in sources.uris}
    results = [
        *detect_videos(
            sources.uris, model, config.resources, durations=known, progress=_show_progress
        )
    ]
    detections = {r.video_id: r.found.detections for r in results if r.found is not None}
    write_detections(output / DETECTIONS_FILE, detections, read_spec(model).classes)
    reasons = {r.video_id: "; ".join(r.problems) for r in results if r.problems}
    failures = {**sources.failures, **{n: w for n, w in reasons.items() if n not in detections}}
    check_failures(failures, total, config.max_failed, prefix="--")
    usable = tuple(v for v in plan.validation if v.annotation.video_id not in failures)
    seen = replace(plan, validation=usable, failures=failures)
    labelled = read_labelled([output / DETECTIONS_FILE], seen, config)
    remarks = (
        *sources.remarks,
        *(f"{n} is damaged in part: {w}" for n, w in reasons.items() if n in detections),
        *(f"{name} is left out: {why}" for name, why in failures.items()),
        *labelled.remarks,
    )
    return replace(labelled, remarks=remarks)


def _show_progress(done: int, total: int) -> None:
    if done % max(1, total // 20) == 0 or done == total:
        print(f"  {done} of {total} windows", flush=True)
