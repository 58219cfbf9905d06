"""What a saved detector finds in the videos of a subset, as a file of detections."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.core.figures import pictures
from pipelines.core.storage import list_files, require
from pipelines.data.plan import Plan
from pipelines.data.shards import find_in_shards, read_manifest
from pipelines.inference.detecting import Resources, detect_videos
from pipelines.inference.evaluation import Evaluation, Labelled, Row, metrics_of, tables_of
from pipelines.training.model import ACTION
from pipelines.training.results import timelines_of
from re2tal.atomic import replacing
from re2tal.detection.files import write_detections
from re2tal.errors import UserError
from re2tal.trained import DetectorSpec, read_spec
from re2tal.videos.files import match_videos


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """The videos that a detector is to see.

    Attributes:
        uris: video id to path or URI, also of a video in a shard.
        failures: video id to why there is none.
        remarks: what may surprise, a sentence each.
    """

    uris: Mapping[str, str]
    failures: Mapping[str, str]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What did not go well.

    Attributes:
        failures: video id to why nothing of it could be decoded.
        remarks: what may surprise, a sentence each.
    """

    failures: Mapping[str, str]
    remarks: tuple[str, ...]


def check_classes(spec: DetectorSpec, classes: Sequence[str]) -> None:
    """Refuses a detector of classes that the annotations do not have.

    Args:
        spec: of the detector.
        classes: of the annotations.

    Raises:
        UserError: naming some of its classes.
    """
    unknown = sorted(set(spec.classes) - set(classes) - {ACTION})
    if unknown:
        listed = ", ".join(unknown[:5]) + ", ..." * (len(unknown) > 5)
        raise UserError(
            f"{len(unknown)} of the {len(spec.classes)} classes of the detector are none of the "
            f"annotations' ({listed}): was it trained on another data set? Correct --model or "
            "--annotations."
        )


def sources_of(folder: str | None, plan: Plan, spec: DetectorSpec) -> Sources:
    """Finds the videos of the plan, as files or in shards.

    Args:
        folder: path or URI of the videos.
        plan: the annotated videos.
        spec: of the detector: it says which shards suit.

    Raises:
        UserError: if the folder is missing; if it holds shards that are not complete.
    """
    place = require(folder, what="The videos", option="--videos")
    video_ids = [video.annotation.video_id for video in plan.validation]
    manifest = read_manifest(place)
    if manifest is None:
        uris, failures = match_videos(video_ids, list_files(place))
        return Sources(uris=uris, failures=failures)
    found = find_in_shards(
        place,
        manifest,
        video_ids,
        fingerprint=plan.fingerprint,
        size=spec.size,
        fps=spec.window.fps,
    )
    return Sources(uris=found.uris, failures=found.failures, remarks=found.remarks)


def detect_all(
    model: Path,
    sources: Sources,
    plan: Plan,
    resources: Resources,
    target: Path,
    *,
    progress: Callable[[int, int], None],
) -> Outcome:
    """Runs a detector over the videos and writes what it finds; Ray is running.

    Args:
        model: folder of the saved detector.
        sources: the videos.
        plan: their annotations.
        resources: what to run on.
        target: the JSON file; it is replaced.
        progress: is told how many windows are through, and of how many.

    Raises:
        UserError: if the cluster is too small.
    """
    durations = {v.annotation.video_id: v.annotation.duration for v in plan.validation}
    known = {video_id: durations[video_id] for video_id in sources.uris}
    results = list(
        detect_videos(sources.uris, model, resources, durations=known, progress=progress)
    )
    detections = {r.video_id: r.found.detections for r in results if r.found is not None}
    write_detections(target, detections, read_spec(model).classes)
    reasons = {r.video_id: "; ".join(r.problems) for r in results if r.problems}
    failures = {**sources.failures, **{n: w for n, w in reasons.items() if n not in detections}}
    damaged = [f"{n} is damaged in part: {w}" for n, w in reasons.items() if n in detections]
    return Outcome(failures=failures, remarks=(*sources.remarks, *damaged))


_WHOLE = "evaluation.json"
_PICTURES = "pictures"


def write_evaluation(folder: Path, evaluation: Evaluation, labelled: Labelled) -> list[Path]:
    """Writes all tables as CSV and in `evaluation.json`, and the pictures.

    Args:
        folder: where to; it is made. Files of an earlier evaluation are replaced.
        evaluation: the numbers.
        labelled: the detections.

    Returns:
        The files, relative to the folder.
    """
    (folder / _PICTURES).mkdir(parents=True, exist_ok=True)
    tables = tables_of(evaluation)
    content = {"metrics": metrics_of(evaluation), "tables": tables}
    with replacing(folder / _WHOLE) as partial:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False))
    written = [Path(_WHOLE)]
    for name, rows in tables.items():
        written.append(Path(f"{name}.csv"))
        _write_csv(folder / written[-1], rows)
    figures = {f"diagnosis_{name}": one for name, one in pictures(evaluation.diagnosis).items()}
    figures["timelines"] = timelines_of(labelled.plan, labelled.detections)
    for name, figure in figures.items():
        written.append(Path(_PICTURES) / f"{name}.png")
        figure.savefig(folder / written[-1])
    return written


def _write_csv(path: Path, rows: list[Row]) -> None:
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
