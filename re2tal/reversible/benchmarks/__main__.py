"""``python -m re2tal.reversible.benchmarks memory|time|verify|drift|devices|tables``."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pipelines.experiments.benchmarking import Benchmark, Tables, run
from re2tal.reversible.benchmarks import devices, drift, memory, timing, verification
from pipelines.experiments.models import MODELS, Workload

RESULTS = Path(__file__).parent / "results"


def _measure_device(
    device: str, models: Sequence[str], frames: Sequence[int], size: int, rounds: int
) -> Tables:
    workloads = [
        Workload(model=name, frames=frames[0], size=size, bfloat16=True) for name in models
    ]
    return devices.measure(workloads, frames, torch.device(device), rounds)


BENCHMARKS = {
    "memory": Benchmark(
        text="resident memory of fresh processes, and predictions", measure=memory.measure
    ),
    "time": Benchmark(
        text="time of a step, each way to train paired with every other", measure=timing.measure
    ),
    "verify": Benchmark(
        text="time that comparing the rebuilt input takes", measure=verification.measure
    ),
    "drift": Benchmark(
        text="errors of gradients, on the grid and without it", measure=drift.measure
    ),
    "devices": Benchmark(
        text="peak memory and time of a step on an accelerator",
        measure=_measure_device,
        options={
            "device": {"default": "cuda"},
            "models": {
                "nargs": "+",
                "default": ["swin3d_t", "slowfast_101"],
                "choices": MODELS,
                "metavar": "NAME",
            },
            "frames": {"nargs": "+", "type": int, "default": [64, 256, 768]},
            "size": {"type": int, "default": 224, "help": "height and width of a frame"},
            "rounds": {"type": int, "default": 5},
        },
    ),
}


def main(arguments: Sequence[str]) -> None:
    """Measures, and writes the results; or prints the tables of all results."""
    run("re2tal.reversible.benchmarks", BENCHMARKS, RESULTS, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
