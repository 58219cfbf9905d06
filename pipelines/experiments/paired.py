"""Times of several ways to compute the same, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, TypeVar

from pipelines.experiments.benchmarking import Row

Result = TypeVar("Result")


def compare(
    ways: Mapping[str, Callable[[], Result]],
    rounds: int,
    difference: Callable[[Result, Result], float],
) -> list[Row]:
    """A row for each way, compared with the first: median seconds, and by how much results differ.

    Args:
        ways: by name.
        rounds: how often each way runs.
        difference: of the results of two ways.
    """
    times, results = timed(ways, rounds)
    reference, *_ = ways
    return [
        {
            "way": name,
            "seconds": median(seconds),
            "times as fast": median(a / b for a, b in zip(times[reference], seconds, strict=True)),
            "largest difference": difference(results[name], results[reference]),
        }
        for name, seconds in times.items()
    ]


def timed(
    ways: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each round, and results, by way.

    Every round runs each way once, one after the other. Seconds are those that this process
    computes (of all of its threads together): a load from outside adds little to them.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            results[name] = way()
            times[name].append(time.process_time() - start)
    return times, results
