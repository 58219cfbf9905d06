"""``python -m re2tal.reversible.benchmarks memory|time|verify|drift|devices|tables``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from re2tal.reversible.benchmarks import devices, drift, memory, timing, verification
from re2tal.reversible.benchmarks.records import RESULTS, Tables, markdown, save
from re2tal.reversible.benchmarks.workloads import MODELS, Workload

_ON_THE_HOST: dict[str, tuple[str, Callable[[], Tables]]] = {
    "memory": ("resident memory of fresh processes, and predictions", memory.measure),
    "time": ("time of a step, each way to train paired with every other", timing.measure),
    "verify": ("time that comparing the rebuilt input takes", verification.measure),
    "drift": ("errors of gradients, on the grid and without it", drift.measure),
}


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the results; or print the tables of all results."""
    options = _parser().parse_args(arguments)
    if options.benchmark == "tables":
        parts = [markdown(path) for path in sorted(RESULTS.glob("*.json"))]
        sys.stdout.write("\n\n".join(parts) + "\n")
        return
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    if options.benchmark == "devices":
        device = torch.device(options.device)
        workloads = [
            Workload(model=name, frames=options.frames[0], size=options.size, bfloat16=True)
            for name in options.models
        ]
        tables = devices.measure(workloads, options.frames, device, options.rounds)
    else:
        tables = _ON_THE_HOST[options.benchmark][1]()
    output = options.output or RESULTS / f"{options.benchmark}.json"
    # Where the file lies is no circumstance of the measurement.
    command = [word for word in arguments if word not in ("--output", str(options.output))]
    save(tables, output, command, device)
    sys.stdout.write(markdown(output) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m re2tal.reversible.benchmarks")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    found = [
        commands.add_parser(name, help=text, description=text)
        for name, (text, _) in _ON_THE_HOST.items()
    ]
    text = "peak memory and time of a step on an accelerator"
    found.append(commands.add_parser("devices", help=text, description=text))
    accelerator = found[-1]
    accelerator.add_argument("--device", default="cuda")
    accelerator.add_argument(
        "--models", nargs="+", default=["swin3d_t", "slowfast_101"], choices=MODELS, metavar="NAME"
    )
    accelerator.add_argument("--frames", nargs="+", type=int, default=[64, 256, 768])
    accelerator.add_argument("--size", type=int, default=224, help="height and width of a frame")
    accelerator.add_argument("--rounds", type=int, default=5)
    for command in found:
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        command.add_argument("--output", type=Path, help="the JSON file; else in results/")
    commands.add_parser("tables", help="print all results as Markdown tables")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
