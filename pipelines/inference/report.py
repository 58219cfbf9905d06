"""Metrics of an evaluation: computed, printed, and written as tables and pictures."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipelines.core.figures import drawn, pictures
from pipelines.core.tables import write_csv
from pipelines.data.plan import Plan
from pipelines.training.results import diagnosis_of, timelines_of
from pipelines.training.validation import compare, metrics_of
from re2tal.annotations import Characteristics
from re2tal.atomic import replacing
from re2tal.detection.diagnosis import Diagnosis, tables
from re2tal.detection.diagnosis import metrics as diagnosis_metrics
from re2tal.detection.evaluation import Result, Row
from re2tal.detection.segments import Detections


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """Detections, and the annotations that they are compared with.

    Attributes:
        plan: the annotated videos; for class-agnostic proposals without video scores, all actions
            have the one class `ACTION`.
        detections: video id to detections in seconds, with the classes of the plan.
        proposals: video id to detections before an external classifier assigned their classes.
        remarks: sentences about unexpected facts.
        warnings: sentences about facts that make the metrics doubtful.
    """

    plan: Plan
    detections: Mapping[str, Detections]
    proposals: Mapping[str, Detections]
    remarks: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Metrics of an evaluation.

    Attributes:
        results: metrics by their names in `METRICS`.
        diagnosis: kinds of errors, sensitivity of mAP to characteristics, and missed instances.
    """

    classes: tuple[str, ...]
    results: Mapping[str, Result]
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
        thresholds: tIoU thresholds of mAP, Recall@kx and diagnosis; average recall uses
            ActivityNet's.
        ks: each k of Recall@kx.
        bins: bins of the diagnosis.
        ignore_ambiguous: ignore detections on stretches annotated as ambiguous.

    Raises:
        ValueError: if a threshold is not in (0, 1], or there is no instance to find.
    """
    plan = labelled.plan
    results = compare(
        labelled.detections,
        plan.validation,
        plan.classes,
        thresholds,
        proposals=labelled.proposals,
        ignore_ambiguous=ignore_ambiguous,
        ks=ks,
    )
    return Evaluation(
        classes=plan.classes,
        results=results,
        diagnosis=diagnosis_of(plan, labelled.detections, thresholds=thresholds, bins=bins),
    )


def logged(evaluation: Evaluation) -> dict[str, float]:
    """Return the metrics for MLflow, by the names that they have in training."""
    metrics = metrics_of(evaluation.results, evaluation.classes)
    return metrics | diagnosis_metrics(evaluation.diagnosis)


def tables_of(evaluation: Evaluation) -> dict[str, list[Row]]:
    """Return the metrics as rows of plain values.

    Returns:
        The table of each metric by name, and those of the diagnosis with the prefix `diagnosis_`.
    """
    classes = evaluation.classes
    return {
        **{name: result.rows(classes) for name, result in evaluation.results.items()},
        **{f"diagnosis_{name}": rows for name, rows in tables(evaluation.diagnosis).items()},
    }


_PERCENT = ".1%"


def print_evaluation(evaluation: Evaluation, *, title: str) -> None:
    """Print average precision by class and threshold, recall, and a summary of the diagnosis."""
    table = _precision(evaluation, title)
    # as wide as the table: rich assumes 80 columns for a pipe, and would truncate numbers
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
    for result in evaluation.results.values():
        yield from result.lines()
    values = diagnosis_metrics(evaluation.diagnosis)
    yield f"top predictions      {_share(values, 'diagnosis/top_1G/', _PERCENT)}"
    yield f"mAP lost by errors   {_share(values, 'diagnosis/effect/', '.3f')}"
    yield f"instances missed     {values['diagnosis/missed']:{_PERCENT}}"
    for name in evaluation.diagnosis.placed:
        missed = _share(values, f"diagnosis/missed/{name}/", _PERCENT)
        yield f"  by {name:<16}{missed}"


def _share(values: dict[str, float], prefix: str, form: str) -> str:
    """List the values whose names begin with `prefix`, which is left out of the names."""
    return ", ".join(
        f"{name.removeprefix(prefix).replace('_', ' ')} {value:{form}}"
        for name, value in values.items()
        if name.startswith(prefix)
    )


_WHOLE = "evaluation.json"
_PICTURES = "pictures"


def write_evaluation(folder: Path, evaluation: Evaluation, labelled: Labelled) -> list[Path]:
    """Write all tables as CSV and in `evaluation.json`, and the pictures.

    A missing folder is created; files of an earlier evaluation are replaced.

    Returns:
        The files, relative to the folder.
    """
    (folder / _PICTURES).mkdir(parents=True, exist_ok=True)
    tables = tables_of(evaluation)
    content = {"metrics": logged(evaluation), "tables": tables}
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
        with drawn():
            figure.savefig(folder / written[-1])
    return written
