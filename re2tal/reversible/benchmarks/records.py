"""Results as JSON files with what they were measured on, and as Markdown tables."""

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision

Row = dict[str, Any]
"""A row of a table, by column; lists in it are kept in the file and left out of the table."""

Tables = dict[str, list[Row]]
"""Rows by the title of their table; all rows of a table have the same columns."""

RESULTS = Path(__file__).parent / "results"


def save(tables: Tables, path: Path, command: Sequence[str], device: torch.device) -> None:
    """Write tables and their circumstances.

    Args:
        tables: what was measured.
        path: the file; it is replaced.
        command: arguments of ``python -m re2tal.reversible.benchmarks``.
        device: what was measured.
    """
    record = {
        "command": " ".join(["python -m re2tal.reversible.benchmarks", *command]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": _name_of(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "tables": tables,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def markdown(path: Path) -> str:
    """The tables of a file that `save` wrote, with their circumstances."""
    record = json.loads(path.read_text(encoding="utf-8"))
    circumstances = (
        f"`{record['command']}`, {record['date']}: {record['device']}, "
        f"{record['threads']} threads, torch {record['torch']}."
    )
    parts = [circumstances]
    for title, rows in record["tables"].items():
        parts += [f"**{title}**", _table(rows)]
    return "\n\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    columns = [name for name, value in rows[0].items() if not isinstance(value, list)]
    lines = [columns, ["---"] * len(columns)]
    lines += [[_text(row[name]) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
