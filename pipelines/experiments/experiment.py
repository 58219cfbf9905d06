"""What an experiment is: pieces of work that do not need each other, and what is made of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from matplotlib.figure import Figure

from pipelines.experiments.benchmarking import Tables

Result = Any
"""What a piece of work returns: whatever JSON can hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A piece of work that a process does by itself.

    Attributes:
        name: what is shown while it is done; no other job of its experiment has it.
        work: a function of a module, so that any process finds it.
        arguments: of it, which JSON can hold: a result is kept for as long as they stay the same.
        alone: nothing else is to run meanwhile: it measures time, or spreads over the cluster.
        spreads: it asks the cluster for what it needs by itself, as Ray Train does.
    """

    name: str
    work: Callable[..., Result]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    spreads: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What came out about a claim.

    Attributes:
        claim: in a sentence.
        holds: whether it does at this scale; None if it cannot be told.
        evidence: the numbers that say so.
    """

    claim: str
    holds: bool | None
    evidence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """What the report says of an experiment.

    Attributes:
        title: of the section.
        text: how it was measured: data, sizes, seeds, what else there is to know.
        findings: on the claims that it is about.
        tables: by their titles.
        figures: by name, without a file's ending.
        metrics: for MLflow, by name.
    """

    title: str
    text: str
    findings: Sequence[Finding]
    tables: Tables
    figures: Mapping[str, Figure] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a job ended.

    Attributes:
        experiment: name of the experiment.
        job: what was done.
        result: what came out; None if it failed.
        seconds: that it took.
        error: why it failed; empty if it did not.
    """

    experiment: str
    job: Job
    result: Result
    seconds: float
    error: str = ""


@runtime_checkable
class Prepares(Protocol):
    """An experiment on data that the project makes."""

    def prepare(self) -> None:
        """Makes the data, if they are not there."""


class Experiment(Protocol):
    """An experiment, as configured."""

    @property
    def name(self) -> str:
        """A word, for the command line and for files."""

    def jobs(self) -> Sequence[Job]:
        """All its pieces of work."""

    def section(self, results: Mapping[str, Result]) -> Section:
        """What the report says.

        Args:
            results: of all jobs, by their names.
        """
