"""How good detections are, and what is wrong with them, in one place."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipelines.config.recipe import Dataset
from pipelines.data.plan import Plan
from pipelines.training.model import ACTION
from pipelines.training.results import diagnosis_of
from pipelines.training.validation import (
    PROPOSALS,
    ground_truth,
    map_metrics,
    precision,
    recall_metrics,
)
from re2tal.detection.diagnosis import Diagnosis, tables
from re2tal.detection.diagnosis import metrics as diagnosis_metrics
from re2tal.detection.evaluation import MapResult, ProposalRecall, average_recall
from re2tal.detection.files import read_detections
from re2tal.detection.segments import Detections
from re2tal.detection.video_scores import fuse_videos
from re2tal.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """What is evaluated against what.

    Attributes:
        plan: the annotated videos; of class-agnostic proposals without video scores, all their
            actions have the one class `ACTION`.
        detections: video id to detections in seconds, with the classes of the plan.
        proposals: video id to the same before an external classifier named their classes.
        remarks: what may surprise, a sentence each.
    """

    plan: Plan
    detections: Mapping[str, Detections]
    proposals: Mapping[str, Detections]
    remarks: tuple[str, ...]


def read_labelled(path: Path, plan: Plan, *, top: int) -> Labelled:
    """Reads detections of the plan's videos; those of other videos are left out.

    Args:
        path: JSON in ActivityNet's form, with the classes of the plan or the one class `ACTION`.
        plan: the videos and classes, and the video scores if there are any.
        top: how many classes each proposal is given by them.

    Raises:
        FileError: with everything that is wrong in the file.
        UserError: if proposals and detections with classes are mixed, or there are video scores for
            the latter.
    """
    names = plan.classes if ACTION in plan.classes else (*plan.classes, ACTION)
    found = read_detections(path, names)
    evaluated = {video.annotation.video_id for video in plan.validation}
    proposals = {video_id: one for video_id, one in found.items() if video_id in evaluated}
    remarks = tuple(_remarks(found, proposals, evaluated))
    if not _agnostic(proposals, names, plan.classes, path):
        if plan.video_scores is not None:
            raise UserError(
                f"--video-scores gives proposals their classes, but the detections in {path} have "
                "classes already: leave the scores out."
            )
        return Labelled(plan=plan, detections=proposals, proposals=proposals, remarks=remarks)
    if plan.video_scores is not None:
        fused = fuse_videos(proposals, plan.video_scores, top=top)
        return Labelled(plan=plan, detections=fused, proposals=proposals, remarks=remarks)
    whatever = {
        video_id: replace(one, labels=torch.zeros_like(one.labels))
        for video_id, one in proposals.items()
    }
    return Labelled(
        plan=plan.restricted((ACTION,)), detections=whatever, proposals=whatever, remarks=remarks
    )


def _agnostic(
    proposals: Mapping[str, Detections], names: Sequence[str], classes: Sequence[str], path: Path
) -> bool:
    """Whether all detections have the one class that is none of the annotations'."""
    labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(p.labels for p in proposals.values())])
    without = labels == names.index(ACTION)
    if ACTION in classes or not without.any():
        return False
    if not without.all():
        raise UserError(
            f"{int(without.sum())} of the {len(labels)} detections in {path} have the class "
            f"{ACTION!r} of proposals, the others classes of the annotations: evaluate them apart."
        )
    return True


def _remarks(
    found: Mapping[str, Detections], kept: Mapping[str, Detections], evaluated: set[str]
) -> list[str]:
    """What the file holds too much and what it lacks."""
    remarks = []
    if left_out := len(found) - len(kept):
        remarks.append(f"detections of {left_out} videos that are not of the subset are left out")
    if missing := sorted(evaluated - kept.keys()):
        listed = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        remarks.append(f"{len(missing)} videos of the subset have no detections ({listed})")
    return remarks


Row = dict[str, str | int | float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The numbers of an evaluation.

    Attributes:
        classes: class names.
        instances: of each class, how many there are to find.
        precision: average precision by class and threshold.
        recall: of the proposals, whatever their class, by their number.
        diagnosis: what kinds of errors there are, what mAP depends on and what is missed.
    """

    classes: tuple[str, ...]
    instances: tuple[int, ...]
    precision: MapResult
    recall: ProposalRecall
    diagnosis: Diagnosis


def evaluate(
    labelled: Labelled,
    thresholds: Sequence[float],
    *,
    ignore_ambiguous: bool,
    dataset: Dataset | None,
) -> Evaluation:
    """Holds detections against the annotations.

    Args:
        labelled: detections and annotated videos.
        thresholds: tIoU thresholds of mAP and diagnosis; those of recall are ActivityNet's.
        ignore_ambiguous: detections on stretches that cannot be judged count for nothing.
        dataset: which bins the diagnosis takes.

    Raises:
        ValueError: if a threshold is none, or there is no instance to find.
    """
    plan = labelled.plan
    truth = ground_truth(plan.validation, plan.classes)
    labels = [label for one in truth.values() for label in one.labels.tolist()]
    return Evaluation(
        classes=plan.classes,
        instances=tuple(np.bincount(labels, minlength=len(plan.classes)).tolist()),
        precision=precision(
            labelled.detections,
            plan.validation,
            plan.classes,
            thresholds,
            ignore_ambiguous=ignore_ambiguous,
        ),
        recall=average_recall(truth, labelled.proposals),
        diagnosis=diagnosis_of(plan, labelled.detections, thresholds=thresholds, dataset=dataset),
    )


def metrics_of(evaluation: Evaluation) -> dict[str, float]:
    """The numbers by the names that they have in training, for MLflow."""
    return {
        **map_metrics(evaluation.precision, evaluation.classes),
        **recall_metrics(evaluation.recall),
        **diagnosis_metrics(evaluation.diagnosis),
    }


def tables_of(evaluation: Evaluation) -> dict[str, list[Row]]:
    """The numbers as rows of plain values.

    Returns:
        `average_precision` (class, instances, average, one column a threshold; mAP comes last),
        `average_recall` (proposals, average, one column a threshold), and the tables of the
        diagnosis with `diagnosis_` in front.
    """
    return {
        "average_precision": _precision_rows(evaluation),
        "average_recall": _recall_rows(evaluation.recall),
        **{f"diagnosis_{name}": rows for name, rows in tables(evaluation.diagnosis).items()},
    }


def _precision_rows(evaluation: Evaluation) -> list[Row]:
    result = evaluation.precision
    rows = [
        _row({"class": name, "instances": count}, result.thresholds, result.per_class[:, index])
        for index, (name, count) in enumerate(
            zip(evaluation.classes, evaluation.instances, strict=True)
        )
    ]
    whole: Row = {"class": "mAP", "instances": sum(evaluation.instances)}
    return [*rows, _row(whole, result.thresholds, result.mAP)]


def _recall_rows(result: ProposalRecall) -> list[Row]:
    return [
        _row({"proposals": index + 1}, result.thresholds, result.recall[:, index])
        for index in range(len(result.average_recall))
    ]


def _row(head: Row, thresholds: np.ndarray, values: np.ndarray) -> Row:
    """A mean, then a value for each threshold; None where there is none."""
    numbers = {
        "average": values.mean(),
        **{f"tIoU {float(t):.2f}": value for t, value in zip(thresholds, values, strict=True)},
    }
    return head | {
        name: float(value) if np.isfinite(value) else None for name, value in numbers.items()
    }


_LOW = (0.1, 0.2, 0.3, 0.4, 0.5)
_MIDDLE = (0.3, 0.4, 0.5, 0.6, 0.7)
_HIGH = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)

USUAL_THRESHOLDS: Mapping[Dataset | None, tuple[float, ...]] = {
    None: _MIDDLE,
    "thumos-14": _MIDDLE,
    "multithumos": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "activitynet-1.3": _HIGH,
    "hacs-segments": _HIGH,
    "fineaction": _HIGH,
    "epic-kitchens-100": _LOW,
    "ego4d-mq": _LOW,
}
"""By data set; None is any other."""


_PERCENT = ".1%"


def print_evaluation(evaluation: Evaluation, *, title: str) -> None:
    """Prints average precision of each class at each threshold, recall, and the diagnosis in short.

    Args:
        evaluation: the numbers.
        title: above the table.
    """
    table = _precision(evaluation, title)
    # as wide as the table: a pipe has 80 columns, which would leave numbers out
    console = Console(width=max(Console().width, 40 + 11 * len(table.columns)))
    console.print(table)
    for line in _lines(evaluation):
        print(line)


def _precision(evaluation: Evaluation, title: str) -> Table:
    table = Table(title=title)
    rows = tables_of(evaluation)["average_precision"]
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "class" else "right")
    for row in rows:
        last = row is rows[-1]
        cells = [_cell(value) for value in row.values()]
        table.add_row(*cells, style="bold" if last else None, end_section=row is rows[-2])
    return table


def _cell(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else str(value)


def _lines(evaluation: Evaluation) -> Iterator[str]:
    recall = evaluation.recall
    numbers = (f"AR@{n} {recall.average_recall[n - 1]:.3f}" for n in PROPOSALS)
    yield f"average recall       {', '.join(numbers)}, area {recall.auc:.1f} %"
    values = diagnosis_metrics(evaluation.diagnosis)
    yield f"top predictions      {_share(values, 'diagnosis/top_1G/', _PERCENT)}"
    yield f"mAP lost by errors   {_share(values, 'diagnosis/effect/', '.3f')}"
    yield f"instances missed     {values['diagnosis/missed']:{_PERCENT}}"
    for name in evaluation.diagnosis.placed:
        missed = _share(values, f"diagnosis/missed/{name}/", _PERCENT)
        yield f"  by {name:<16}{missed}"


def _share(values: dict[str, float], prefix: str, form: str) -> str:
    """Values by the ends of their names, of those that begin with `prefix`."""
    return ", ".join(
        f"{name.removeprefix(prefix).replace('_', ' ')} {value:{form}}"
        for name, value in values.items()
        if name.startswith(prefix)
    )
