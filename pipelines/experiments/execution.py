"""Jobs done in this process, one after the other, without Ray."""

import time
from collections.abc import Callable, Iterator, Sequence

from pipelines.core.clock import duration
from pipelines.experiments.experiment import Experiment, Job, Outcome, Prepares
from pipelines.experiments.records import Records

Work = tuple[str, Job]
"""Name of an experiment, and one of its jobs."""

Execute = Callable[[Sequence[Work]], Iterator[Outcome]]
"""Does jobs, and yields how each ended as it does."""


def execute_here(works: Sequence[Work]) -> Iterator[Outcome]:
    """Does jobs in this process, one after the other.

    Args:
        works: experiment and job.
    """
    for experiment, job in works:
        yield attempt(experiment, job)


def attempt(experiment: str, job: Job) -> Outcome:
    """Does a job. What goes wrong in it is told, and keeps no other from being done.

    Args:
        experiment: name of its experiment.
        job: what to do.
    """
    began = time.perf_counter()
    try:
        result, error = job.work(**job.arguments), ""
    except Exception as problem:  # whatever it is, it goes into the report
        result, error = None, f"{type(problem).__name__}: {problem}"
    seconds = time.perf_counter() - began
    return Outcome(experiment=experiment, job=job, result=result, seconds=seconds, error=error)


def carry_out(
    experiments: Sequence[Experiment], execute: Execute, records: Records, *, resume: bool
) -> Iterator[Outcome]:
    """Makes what the experiments need, and does their jobs that were not done before.

    Args:
        experiments: what to do.
        execute: does it.
        records: results of before; new ones are added.
        resume: take up results of before.
    """
    for experiment in experiments:
        if isinstance(experiment, Prepares):
            experiment.prepare()
    works = [(experiment.name, job) for experiment in experiments for job in experiment.jobs()]
    left = []
    for name, job in works:
        known = records.find(name, job) if resume else None
        if known is None:
            left.append((name, job))
        else:
            yield known
    if len(left) < len(works):
        print(f"{len(works) - len(left)} of {len(works)} jobs were done before", flush=True)
    began = time.perf_counter()
    for done, outcome in enumerate(execute(left), start=1):
        records.keep(outcome)
        to_come = (time.perf_counter() - began) / done * (len(left) - done)
        how = f"FAILED: {outcome.error}" if outcome.error else duration(outcome.seconds)
        print(
            f"{outcome.experiment:<10} {outcome.job.name}: {how}  ({done} of {len(left)}, "
            f"left {duration(to_come)})",
            flush=True,
        )
        yield outcome
