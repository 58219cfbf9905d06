"""Times of several ways to do the same thing, which take turns in one process."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from typing import TypeVar

import torch
from torch import nn

from pipelines.experiments.experiment import Row
from re2tal.memory.ways import Prepare, prepared

T = TypeVar("T")

Times = dict[str, list[float]]
"""Seconds of every round, by way."""


def in_turns(
    ways: Mapping[str, Callable[[], T]], rounds: int, *, before: int = 1
) -> dict[str, list[T]]:
    """Call each way once a round, and list its results.

    The order turns from round to round, so that neither load from outside nor the preceding way
    favours any; ratios within a round compare the ways whatever else the machine does.

    Args:
        ways: functions by name.
        rounds: number of rounds that count.
        before: number of rounds before them that do not count.
    """
    found: dict[str, list[T]] = {name: [] for name in ways}
    order = list(ways)
    for turn in range(before + rounds):
        for name in order:
            measured = ways[name]()
            if turn >= before:
                found[name].append(measured)
        order = [*order[1:], order[0]]
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Compute the lower quartile, the median and the upper quartile."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else list(values) * 3
    return low, median(values), high


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Divide by the reference, round by round."""
    return [a / b for a, b in zip(seconds, reference, strict=True)]


def compared(times: Times, reference: str) -> list[Row]:
    """Tabulate medians, and the quartiles of each round's ratio to a reference."""
    rows: list[Row] = []
    for name, seconds in times.items():
        low, middle, high = quartiles(ratios(seconds, times[reference]))
        rows.append(
            {
                "training": name,
                "seconds": median(seconds),
                f"of {reference}": middle,
                "lower quartile": low,
                "upper quartile": high,
                "rounds": len(seconds),
                "all seconds": seconds,
            }
        )
    return rows


def paired(
    model: nn.Module, step: Callable[[], object], ways: Mapping[str, Prepare], *, rounds: int
) -> Times:
    """Time a training step in every way, on the same model at the same place in memory.

    Args:
        model: model that is trained.
        step: function that runs forward and backward.
        ways: functions that prepare the model, by way.
        rounds: number of rounds that count, after one that does not.
    """

    def time_in(way: Prepare) -> float:
        with prepared(model, way):
            return timed(model, step)

    with _all_kept():
        return in_turns({n: lambda way=way: time_in(way) for n, way in ways.items()}, rounds)  # type: ignore[misc]


@contextmanager
def _all_kept() -> Iterator[None]:
    """Exclude existing objects from garbage collection during each step: imports make a million.

    Scanning them takes longer than a small step.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(model: nn.Module, step: Callable[[], object]) -> float:
    """Measure the seconds of one step, until the device has finished it."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    device = next(model.parameters()).device
    finish(device)
    start = time.perf_counter()
    step()
    finish(device)
    return time.perf_counter() - start


def finish(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def computed(ways: Mapping[str, Callable[[], T]], rounds: int) -> tuple[Times, dict[str, T]]:
    """Measure CPU seconds of all threads of this process, and keep the results.

    Other load on the machine adds little to them.

    Args:
        ways: functions by name.
        rounds: number of rounds, all of which count.
    """
    results: dict[str, T] = {}

    def time_of(name: str, way: Callable[[], T]) -> float:
        start = time.process_time()
        results[name] = way()
        return time.process_time() - start

    turns = {name: lambda n=name, way=way: time_of(n, way) for name, way in ways.items()}
    return in_turns(turns, rounds, before=0), results


def against_the_first(
    ways: Mapping[str, Callable[[], T]], rounds: int, difference: Callable[[T, T], float]
) -> list[Row]:
    """Tabulate seconds as in `computed`, and the difference of results from the first way's."""
    times, results = computed(ways, rounds)
    first, *_ = ways
    return [
        {
            "way": name,
            "seconds": median(seconds),
            "times as fast": median(ratios(times[first], seconds)),
            "largest difference": difference(results[name], results[first]),
        }
        for name, seconds in times.items()
    ]
