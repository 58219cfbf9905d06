"""What benchmarks share: a command, and results as JSON files and Markdown tables."""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision

Row = dict[str, Any]
"""A row of a table, by column; lists in it are kept in the file and left out of the table."""

Tables = dict[str, list[Row]]
"""Rows by the title of their table; all rows of a table have the same columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """What can be measured with one command.

    Attributes:
        text: what it measures, in a few words.
        measure: measures it; it is called with the values of `options` by their names.
        options: of the command line: to a name the arguments of `ArgumentParser.add_argument`.
    """

    text: str
    measure: Callable[..., Tables]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def run(
    package: str, benchmarks: Mapping[str, Benchmark], results: Path, arguments: Sequence[str]
) -> None:
    """The command ``python -m package NAME``: measures, writes the results and prints the tables.

    ``tables`` in the place of a name prints those of all results. An option `device` says what is
    measured; without it, that is the CPU.

    Args:
        package: what holds the benchmarks, as it is imported.
        benchmarks: by name.
        results: folder of the JSON files, unless ``--output`` names one.
        arguments: of the command line.
    """
    options = _parser(package, benchmarks).parse_args(arguments)
    if options.benchmark == "tables":
        parts = [markdown(path) for path in sorted(results.glob("*.json"))]
        sys.stdout.write("\n\n".join(parts) + "\n")
        return
    torch.set_num_threads(options.threads)
    benchmark = benchmarks[options.benchmark]
    tables = benchmark.measure(**{name: getattr(options, name) for name in benchmark.options})
    output = options.output or results / f"{options.benchmark}.json"
    # Where the file lies is no circumstance of the measurement.
    command = [word for word in arguments if word not in ("--output", str(options.output))]
    device = torch.device(getattr(options, "device", "cpu"))
    save(tables, output, f"python -m {package} {' '.join(command)}", device)
    sys.stdout.write(markdown(output) + "\n")


def _parser(package: str, benchmarks: Mapping[str, Benchmark]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {package}")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in benchmarks.items():
        command = commands.add_parser(name, help=benchmark.text, description=benchmark.text)
        for option, settings in benchmark.options.items():
            command.add_argument(f"--{option}", **settings)
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        command.add_argument("--output", type=Path, help="the JSON file; else in results/")
    commands.add_parser("tables", help="print all results as Markdown tables")
    return parser


def save(tables: Tables, path: Path, command: str, device: torch.device) -> None:
    """Writes tables and their circumstances.

    Args:
        tables: what was measured.
        path: the file; it is replaced.
        command: what measures it.
        device: what was measured.
    """
    record = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "device": name_of(device),
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
        parts += [f"**{title}**", table(rows)]
    return "\n\n".join(parts)


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; what is a list is left out.

    Args:
        rows: with the same columns, at least one.
    """
    columns = [name for name, value in rows[0].items() if not isinstance(value, list)]
    lines = [columns, ["---"] * len(columns)]
    lines += [[_text(row[name]) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def name_of(device: torch.device) -> str:
    """What a GPU or this machine's processor is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
