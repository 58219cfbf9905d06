"""Timing of several ways to do the same work, which take turns in one process."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
    """Call each way once a round, and return its results by name.

    The order rotates from round to round, so that neither other load nor the preceding way favours
    one of them; ratios within a round compare the ways whatever else the machine does.

    Args:
        ways: functions by name.
        rounds: number of counted rounds.
        before: number of warm-up rounds before them, which are not counted.
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
    """Tabulate median times, and the quartiles over rounds of the ratio to a reference."""
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
    """Time a training step in every way, on the same model at the same memory addresses."""

    def time_in(way: Prepare) -> float:
        with prepared(model, way):
            return timed(model, step)

    # imports leave a million objects: scanning them for garbage takes longer than a small step
    gc.collect()
    gc.freeze()
    try:
        return in_turns({name: partial(time_in, way) for name, way in ways.items()}, rounds)
    finally:
        gc.unfreeze()


def timed(model: nn.Module, step: Callable[[], object]) -> float:
    """Measure the seconds of one step, including the device's work."""
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
    """Measure CPU seconds of all threads of this process, and return each way's result too.

    Other load on the machine adds little to CPU seconds. All rounds are counted.
    """
    results: dict[str, T] = {}

    def time_of(name: str) -> float:
        start = time.process_time()
        results[name] = ways[name]()
        return time.process_time() - start

    return in_turns({name: partial(time_of, name) for name in ways}, rounds, before=0), results
