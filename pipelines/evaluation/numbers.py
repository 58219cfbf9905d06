"""How good detections are, and what is wrong with them, in one place."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.evaluation.labelled import Labelled
from pipelines.recipe import Dataset
from pipelines.results import diagnosis_of
from pipelines.validation import ground_truth, map_metrics, precision, recall_metrics
from re2tal.detection.diagnosis import Diagnosis, tables
from re2tal.detection.diagnosis import metrics as diagnosis_metrics
from re2tal.detection.evaluation import MapResult, ProposalRecall, average_recall

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
