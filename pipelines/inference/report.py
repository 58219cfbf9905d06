"""Numbers of an evaluation: computed, printed, and written as tables and pictures."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pipelines.core.figures import pictures
from pipelines.core.tables import write_csv
from pipelines.data.plan import Plan
from pipelines.training.results import diagnosis_of, timelines_of
from pipelines.training.validation import (
    PROPOSALS,
    ground_truth,
    instance_recall,
    instance_recall_metrics,
    map_metrics,
    precision,
    recall_metrics,
)
from re2tal.annotations import Characteristics
from re2tal.atomic import replacing
from re2tal.detection.diagnosis import Diagnosis, tables
from re2tal.detection.diagnosis import metrics as diagnosis_metrics
from re2tal.detection.evaluation import ClassRecall, MapResult, ProposalRecall, average_recall
from re2tal.detection.segments import Detections


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """Detections, and the annotations that they are compared with.

    Attributes:
        plan: the annotated videos; for class-agnostic proposals without video scores, all their
            actions have the one class `ACTION`.
        detections: video id to detections in seconds, with the classes of the plan.
        proposals: video id to the same before an external classifier named their classes.
        remarks: sentences about unexpected facts.
        warnings: sentences about facts that make the numbers doubtful.
    """

    plan: Plan
    detections: Mapping[str, Detections]
    proposals: Mapping[str, Detections]
    remarks: tuple[str, ...]
    warnings: tuple[str, ...] = ()


Row = dict[str, str | int | float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Numbers of an evaluation.

    Attributes:
        instances: number of instances of each class.
        precision: average precision by class and threshold.
        recall: recall of the proposals, whatever their class, by their number.
        instance_recall: Recall@kx, of data sets whose benchmark reports it.
        diagnosis: kinds of errors, characteristics on which mAP depends, and missed instances.
    """

    classes: tuple[str, ...]
    instances: tuple[int, ...]
    precision: MapResult
    recall: ProposalRecall
    instance_recall: ClassRecall | None
    diagnosis: Diagnosis


def evaluate(
    labelled: Labelled,
    thresholds: Sequence[float],
    *,
    ks: Sequence[int],
    bins: Characteristics,
    ignore_ambiguous: bool,
) -> Evaluation:
    """Compare detections with the annotations.

    Args:
        labelled: detections and annotated videos.
        thresholds: tIoU thresholds of mAP, Recall@kx and diagnosis; average recall has
            ActivityNet's.
        ks: each k of Recall@kx.
        bins: size bins of the diagnosis.
        ignore_ambiguous: detections on stretches that cannot be judged count for nothing.

    Raises:
        ValueError: if a threshold is not in (0, 1], or there is no instance to find.
    """
    plan = labelled.plan
    compared = (labelled.detections, plan.validation, plan.classes, thresholds)
    truth = ground_truth(plan.validation, plan.classes)
    labels = [label for one in truth.values() for label in one.labels.tolist()]
    return Evaluation(
        classes=plan.classes,
        instances=tuple(np.bincount(labels, minlength=len(plan.classes)).tolist()),
        precision=precision(*compared, ignore_ambiguous=ignore_ambiguous),
        recall=average_recall(truth, labelled.proposals),
        instance_recall=instance_recall(*compared, ks=ks),
        diagnosis=diagnosis_of(plan, labelled.detections, thresholds=thresholds, bins=bins),
    )


def metrics_of(evaluation: Evaluation) -> dict[str, float]:
    """Return the numbers by the names that they have in training, for MLflow."""
    by_instance = evaluation.instance_recall
    return {
        **map_metrics(evaluation.precision, evaluation.classes),
        **recall_metrics(evaluation.recall),
        **(instance_recall_metrics(by_instance) if by_instance else {}),
        **diagnosis_metrics(evaluation.diagnosis),
    }


def tables_of(evaluation: Evaluation) -> dict[str, list[Row]]:
    """Return the numbers as rows of plain values.

    Returns:
        `average_precision` (class, instances, average, one column a threshold; mAP comes last),
        `average_recall` (proposals, average, one column a threshold), `instance_recall` where it is
        reported (k, class, average, one column a threshold; the mean over classes comes last), and
        the tables of the diagnosis with `diagnosis_` in front.
    """
    by_instance = evaluation.instance_recall
    return {
        "average_precision": _precision_rows(evaluation),
        "average_recall": _recall_rows(evaluation.recall),
        **({"instance_recall": _instance_rows(evaluation, by_instance)} if by_instance else {}),
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


def _instance_rows(evaluation: Evaluation, result: ClassRecall) -> list[Row]:
    return [
        _row({"k": k, "class": name}, result.thresholds, values)
        for place, k in enumerate(result.ks)
        for name, values in (
            *zip(evaluation.classes, result.per_class[:, place].T, strict=True),
            ("mean", result.recall[:, place]),
        )
    ]


def _row(head: Row, thresholds: np.ndarray, values: np.ndarray) -> Row:
    """Return a row of a mean, and a value for each threshold; None where there is none."""
    numbers = {
        "average": values.mean(),
        **{f"tIoU {float(t):.2f}": value for t, value in zip(thresholds, values, strict=True)},
    }
    return head | {
        name: float(value) if np.isfinite(value) else None for name, value in numbers.items()
    }


_PERCENT = ".1%"


def print_evaluation(evaluation: Evaluation, *, title: str) -> None:
    """Print average precision of each class and threshold, recall, and the diagnosis in short."""
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
    if by_instance := evaluation.instance_recall:
        for k, of_k in zip(by_instance.ks, by_instance.recall.T, strict=True):
            levels = zip(by_instance.thresholds, of_k, strict=True)
            listed = ", ".join(f"tIoU {level:.2f} {value:.3f}" for level, value in levels)
            yield f"{f'recall@{k}x':<21}{listed}, average {of_k.mean():.3f}"
    values = diagnosis_metrics(evaluation.diagnosis)
    yield f"top predictions      {_share(values, 'diagnosis/top_1G/', _PERCENT)}"
    yield f"mAP lost by errors   {_share(values, 'diagnosis/effect/', '.3f')}"
    yield f"instances missed     {values['diagnosis/missed']:{_PERCENT}}"
    for name in evaluation.diagnosis.placed:
        missed = _share(values, f"diagnosis/missed/{name}/", _PERCENT)
        yield f"  by {name:<16}{missed}"


def _share(values: dict[str, float], prefix: str, form: str) -> str:
    """List the values whose names begin with `prefix`, by the ends of their names."""
    return ", ".join(
        f"{name.removeprefix(prefix).replace('_', ' ')} {value:{form}}"
        for name, value in values.items()
        if name.startswith(prefix)
    )


_WHOLE = "evaluation.json"
_PICTURES = "pictures"


def write_evaluation(folder: Path, evaluation: Evaluation, labelled: Labelled) -> list[Path]:
    """Write all tables as CSV and in `evaluation.json`, and the pictures.

    The folder is made; files of an earlier evaluation in it are replaced.

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
        write_csv(folder / written[-1], [*rows[0]], rows)
    figures = {f"diagnosis_{name}": one for name, one in pictures(evaluation.diagnosis).items()}
    figures["timelines"] = timelines_of(labelled.plan, labelled.detections)
    for name, figure in figures.items():
        written.append(Path(_PICTURES) / f"{name}.png")
        figure.savefig(folder / written[-1])
    return written
