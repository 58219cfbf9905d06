"""``python -m pipelines.benchmarks throughput|shards|scaling|tables``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.benchmarks import scaling, shards, throughput
from pipelines.experiments.benchmarking import Benchmark, run

RESULTS = Path(__file__).parent / "results"

BENCHMARKS = {
    "throughput": Benchmark(
        text="frames that Ray Data delivers, against plain decoding in as many processes",
        measure=throughput.measure,
        options={
            "processes": {"nargs": "+", "type": int, "default": [1, 2]},
            "rounds": {"type": int, "default": 7},
        },
    ),
    "shards": Benchmark(
        text="size of shards, and reading windows from them, against raw files",
        measure=shards.measure,
        options={
            "seconds": {"type": int, "default": 120, "help": "length of the video"},
            "rounds": {"type": int, "default": 7},
        },
    ),
    "scaling": Benchmark(
        text="a training step with more workers, and what exchanging gradients takes of it",
        measure=scaling.measure,
        options={
            "workers": {"nargs": "+", "type": int, "default": [1, 2, 4]},
            "rounds": {"type": int, "default": 9},
        },
    ),
}


def main(arguments: Sequence[str]) -> None:
    """Measures, and writes the results; or prints the tables of all results."""
    run("pipelines.benchmarks", BENCHMARKS, RESULTS, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
