"""An evaluation as files: tables for people and programs, and pictures."""

import csv
import json
from pathlib import Path

from pipelines.diagnosis_figures import pictures
from pipelines.evaluation.labelled import Labelled
from pipelines.evaluation.numbers import Evaluation, Row, metrics_of, tables_of
from pipelines.results import timelines_of
from re2tal.atomic import replacing

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
