"""CSV files for programs and spreadsheets alike.

Spreadsheets treat a cell that begins with one of `=+-@`, a tab or a line break as a formula, so the
name of a class or file could run as code. As OWASP advises, such a text gets an apostrophe in
front, which `read_csv` removes. Numbers stay numbers.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from re2tal.atomic import replacing

# Apostrophes count too: a text that looks guarded gets one more, so that reading restores it.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Format a table as CSV; None and missing values are empty cells."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(map(_guarded, columns))
    for row in rows:
        writer.writerow([_guarded(row.get(name)) for name in columns])
    return text.getvalue()


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table in UTF-8; an existing file is replaced once the new one is whole."""
    with replacing(path) as partial:
        partial.write_text(csv_text(columns, rows), encoding="utf-8", newline="")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a table that `write_csv` wrote, with all values as strings."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = ([_bare(cell) for cell in row] for row in csv.reader(file))
    return [dict(zip(header, row, strict=True)) for row in rows]


def _guarded(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def _bare(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
