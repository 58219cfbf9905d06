"""``python -m sweeps.benchmarks search|tables``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.experiments.benchmarking import Benchmark, run
from sweeps.benchmarks import search

RESULTS = Path(__file__).parent / "results"

BENCHMARKS = {
    "search": Benchmark(
        text="the best of so many trials of sweeps/localizer.py: the sampler, chance, the base",
        measure=search.measure,
        options={
            "annotations": {"required": True, "help": "of the toy data set"},
            "features": {"required": True, "help": "of it, by extract_features.py"},
            "trials": {"type": int, "default": 12},
            "seeds": {"nargs": "+", "type": int, "default": [0, 1, 2]},
        },
    ),
}


def main(arguments: Sequence[str]) -> None:
    """Measures, and writes the results; or prints the tables of all results."""
    run("sweeps.benchmarks", BENCHMARKS, RESULTS, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
