"""``python -m re2tal.detection.benchmarks nms|evaluation|tables``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.experiments.benchmarking import Benchmark, run
from re2tal.detection.benchmarks import evaluation, nms

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = {
    "nms": Benchmark(
        text="soft-NMS of many videos, against a detection at a time", measure=nms.measure
    ),
    "evaluation": Benchmark(
        text="mAP and recall of whole test sets, against a prediction at a time",
        measure=evaluation.measure,
    ),
}


def main(arguments: Sequence[str]) -> None:
    """Measures, and writes the results; or prints the tables of all results."""
    run("re2tal.detection.benchmarks", BENCHMARKS, RESULTS, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
