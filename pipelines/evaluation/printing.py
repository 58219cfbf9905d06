"""An evaluation in the terminal."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from pipelines.evaluation.numbers import Evaluation, tables_of
from pipelines.validation import PROPOSALS
from re2tal.detection.diagnosis import metrics as diagnosis_metrics

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
