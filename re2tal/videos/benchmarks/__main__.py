"""``python -m re2tal.videos.benchmarks augmentation|decoding|tables``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.experiments.benchmarking import Benchmark, run
from re2tal.videos.benchmarks import augmentation, decoding

RESULTS = Path(__file__).parent / "results"

BENCHMARKS = {
    "augmentation": Benchmark(
        text="what augmentation adds to a training step",
        measure=augmentation.measure,
        options={
            "device": {"default": "cpu"},
            "rounds": {"type": int, "default": 5, "help": "that count; one comes before them"},
        },
    ),
    "decoding": Benchmark(
        text="frames per second, paired with those of other decoders that can be imported",
        measure=decoding.measure,
        options={
            "seconds": {"type": int, "default": 120, "help": "length of the videos"},
            "rounds": {"type": int, "default": 7, "help": "that count; one comes before them"},
        },
    ),
}


def main(arguments: Sequence[str]) -> None:
    """Measures, and writes the results; or prints the tables of all results."""
    run("re2tal.videos.benchmarks", BENCHMARKS, RESULTS, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
