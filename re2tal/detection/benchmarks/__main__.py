"""``python -m re2tal.detection.benchmarks nms|evaluation``: measures, and prints tables."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch

Tables = dict[str, list[dict[str, Any]]]
"""Rows by the title of their table; all rows of a table have the same columns."""

# Each is a module of this package, whose `measure()` returns the tables.
_BENCHMARKS = ("nms", "evaluation")


def main(arguments: Sequence[str]) -> None:
    """Measures what the arguments name, and prints the tables in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m re2tal.detection.benchmarks")
    parser.add_argument("benchmark", choices=_BENCHMARKS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tables: Tables = importlib.import_module(f"{__package__}.{options.benchmark}").measure()
    parts = [f"CPU, threads: {options.threads}, torch {torch.__version__}."]
    for title, rows in tables.items():
        parts += [f"**{title}**", _markdown(rows)]
    sys.stdout.write("\n\n".join(parts) + "\n")


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [[_text(row[name]) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main(sys.argv[1:])
