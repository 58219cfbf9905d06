"""Time that comparing the rebuilt inputs takes: of paired steps, and in the checks themselves.

Paired steps show only that `verify=True` costs little: with other jobs on the cores the median
ratio is good to about 1.5 %. So the checks are timed by themselves as well. One subtraction per
stage, of the streams at its bottom, is not among them. The magnitudes of the streams on the grid
are watched with and without `verify`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

from pipelines.experiments.experiment import Row, Tables
from pipelines.experiments.models import SMALL, build
from pipelines.experiments.timing import compared, paired, ratios, timed
from pipelines.training.workload import Workload
from re2tal.memory.ways import Prepare, prepared
from re2tal.reversible import rewire
from re2tal.reversible.watch import Watch, Witness

_WAYS: dict[str, Prepare] = {
    "without": lambda model: rewire(model, verify=False),
    "with": rewire,
}

_CHECKS: tuple[tuple[type, str], ...] = ((Watch, "witness"), (Witness, "compare"))


def measure(*, model: str = "swin3d_t", rounds: int = 25) -> Tables:
    """Time steps of two sizes with and without checks.

    Args:
        model: network of `pipelines/experiments/models.py`.
        rounds: rounds of the larger step; the small one has four times as many.
    """
    steps = {SMALL: rounds, replace(SMALL, frames=16, size=56): 4 * rounds}
    tables: Tables = {}
    for work, turns in steps.items():
        network, inputs = build(model), work.noise()
        times = paired(network, lambda: work.step(network, *inputs), _WAYS, rounds=turns)  # noqa: B023
        tables[f"With and without verification: {model}, {work}"] = compared(times, "without")
    tables["Time in the checks themselves"] = [checks_alone(model, w, rounds=15) for w in steps]
    return tables


def checks_alone(model: str, work: Workload, rounds: int) -> Row:
    """Measure the seconds that a step spends in checks, on a CPU, where calls return when done."""
    spent: list[float] = []
    steps: list[float] = []
    network, inputs = build(model), work.noise()
    with prepared(network, rewire):
        for _ in range(rounds + 1):
            with _stopwatch() as seconds:
                steps.append(timed(network, lambda: work.step(network, *inputs)))
            spent.append(sum(seconds))
    shares = ratios(spent[1:], steps[1:])
    return {
        "step": f"{model}, {work}",
        "seconds in checks": median(spent[1:]),
        "of the step": median(shares),
        "largest share": max(shares),
        "rounds": rounds,
    }


@contextmanager
def _stopwatch() -> Iterator[list[float]]:
    """Collect the seconds of every check while the block runs."""
    seconds: list[float] = []

    def watched(check: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return check(*args)
            finally:
                seconds.append(time.perf_counter() - start)

        return run

    found = [(owner, name, getattr(owner, name)) for owner, name in _CHECKS]
    for owner, name, check in found:
        setattr(owner, name, watched(check))
    try:
        yield seconds
    finally:
        for owner, name, check in found:
            setattr(owner, name, check)
