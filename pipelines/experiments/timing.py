"""Time of a training step, each way to train paired with every other in one process."""

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Protocol

import torch
from torch import Tensor, nn

from pipelines.experiments.benchmarking import Row, Tables
from pipelines.experiments.variants import REFERENCE, VARIANTS, Prepare, prepared
from pipelines.experiments.models import SMALL, Workload

Times = dict[str, list[float]]


class Step(Protocol):
    """What is timed; a `Workload` is one."""

    def step(self, model: nn.Module, video: Tensor) -> None:
        """Forward and backward."""


def measure() -> Tables:
    """The tables of the command ``time``."""
    workloads = [
        SMALL,
        Workload(model="slowfast_50", frames=32, size=64),
        Workload(model="r3d_18", frames=16, size=64),
    ]
    return {f"Time of a step: {w}": against(w, VARIANTS, REFERENCE, rounds=9) for w in workloads}


def against(
    workload: Workload, ways: Mapping[str, Prepare], reference: str, rounds: int
) -> list[Row]:
    """Ways to train compared with one of them; see `paired` and `compared`."""
    times = paired(workload.build(), workload, workload.video(), ways, rounds=rounds)
    return compared(times, reference)


def paired(
    model: nn.Module, workload: Step, video: Tensor, ways: Mapping[str, Prepare], *, rounds: int
) -> Times:
    """Seconds of a step, for each way to train and each round.

    Every round runs each way once, on the same model at the same place in memory. The order turns
    from round to round, so that a load from outside, or the way before, favours none.

    Args:
        model: on the device of the video.
        workload: the step.
        video: what it is called with.
        ways: what is done to the model for each way to train.
        rounds: that count; one comes before them.
    """
    times: Times = {name: [] for name in ways}
    order = list(ways)
    with _all_kept():
        for turn in range(rounds + 1):
            for name in order:
                with prepared(model, ways[name]):
                    seconds = timed(model, workload, video)
                if turn > 0:
                    times[name].append(seconds)
            order = [*order[1:], order[0]]
    return times


@contextmanager
def _all_kept() -> Iterator[None]:
    """Spares the garbage collector, before each step, what is there: a million objects of imports.

    To look through them takes longer than a small step.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(model: nn.Module, workload: Step, video: Tensor) -> float:
    """Seconds of one step, until the device has finished it."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    finish(video.device)
    start = time.perf_counter()
    workload.step(model, video)
    finish(video.device)
    return time.perf_counter() - start


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compared(times: Times, reference: str) -> list[Row]:
    """Medians, and of the ratios of each round to the reference the median and the quartiles."""
    rows: list[Row] = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[reference], strict=True)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                "training": name,
                "seconds": median(seconds),
                f"of {reference}": median(ratios),
                "lower quartile": low,
                "upper quartile": high,
                "rounds": len(seconds),
                "all seconds": seconds,
            }
        )
    return rows
