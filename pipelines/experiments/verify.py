"""Time that comparing the rebuilt inputs takes: of paired steps, and in the checks themselves."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

from pipelines.experiments.benchmarking import Row, Tables
from re2tal.reversible import rewire
from pipelines.experiments.timing import against, timed
from pipelines.experiments.variants import Prepare, prepared
from pipelines.experiments.models import SMALL, Workload
from re2tal.reversible.watch import Watch, Witness

_WAYS: dict[str, Prepare] = {
    "without": lambda model: rewire(model, verify=False),
    "with": rewire,
}

_CHECKS: tuple[tuple[type, str], ...] = ((Watch, "witness"), (Witness, "compare"))


def measure() -> Tables:
    """The tables of the command ``verify``."""
    workloads = {SMALL: 25, replace(SMALL, frames=16, size=56): 100}
    tables: Tables = {
        f"With and without verification: {workload}": against(
            workload, _WAYS, "without", rounds=rounds
        )
        for workload, rounds in workloads.items()
    }
    tables["Time in the checks themselves"] = [checks_alone(w, rounds=15) for w in workloads]
    return tables


def checks_alone(workload: Workload, rounds: int) -> Row:
    """Seconds that a step spends in checks; on a host, where a call returns when it is done."""
    spent: list[float] = []
    steps: list[float] = []
    model, video = workload.build(), workload.video()
    with prepared(model, rewire):
        for _ in range(rounds + 1):
            with _stopwatch() as seconds:
                steps.append(timed(model, workload, video))
            spent.append(sum(seconds))
    shares = [a / b for a, b in zip(spent[1:], steps[1:], strict=True)]
    return {
        "step": str(workload),
        "seconds in checks": median(spent[1:]),
        "of the step": median(shares),
        "largest share": max(shares),
        "rounds": rounds,
    }


@contextmanager
def _stopwatch() -> Iterator[list[float]]:
    """The seconds of every check while the block runs."""
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
