"""Parts of an experiment: independent jobs, and claims about their results."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from re2tal.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
"""Row of a table, by column; lists in it are kept in files and left out of printed tables."""

Tables = dict[str, list[Row]]
"""Rows by the title of their table; all rows of a table have the same columns."""

Result = Any
"""Whatever a job returns that JSON can hold."""


def device() -> torch.device:
    """Choose a GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Piece of work that one process does by itself.

    Attributes:
        name: title, different from those of the experiment's other jobs.
        work: function of a module, so that any process can import it.
        arguments: arguments that JSON can hold; a result is kept for as long as they stay the same.
        alone: nothing else runs meanwhile, because it measures time or spreads over the cluster.
        spreads: it asks the cluster for resources by itself, as Ray Train does.
    """

    name: str
    work: Callable[..., Result]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    spreads: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Verdict on a claim.

    Attributes:
        claim: claim in a sentence.
        holds: verdict at this scale; None if the numbers cannot tell.
        evidence: numbers behind the verdict.
    """

    claim: str
    holds: bool | None
    evidence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Report of an experiment.

    Attributes:
        title: title of the section.
        text: description of the measurement: data, sizes, seeds.
        tables: rows by the titles of their tables.
        findings: verdicts on the claims of the experiment.
        figures: pictures by name, without a file's ending.
        metrics: numbers for MLflow.
    """

    title: str
    text: str
    tables: Tables
    findings: Sequence[Finding] = ()
    figures: Mapping[str, "Figure"] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """End of a job.

    Attributes:
        experiment: name of the experiment.
        job: job that ended.
        result: result of the job; None if it failed.
        seconds: duration of the job.
        error: reason of its failure; empty if it did not fail.
    """

    experiment: str
    job: Job
    result: Result
    seconds: float
    error: str = ""


@runtime_checkable
class Prepares(Protocol):
    """Experiment on data that the project makes."""

    def prepare(self) -> None:
        """Make the data if they are missing."""


class Experiment(Protocol):
    """Configured experiment."""

    def jobs(self) -> Sequence[Job]:
        """List all pieces of work."""

    def section(self, results: Mapping[str, Result]) -> Section:
        """Report on the results of all jobs, by their names."""


_TABLES = "tables"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Experiment of one job, whose result is tables.

    Attributes:
        measure: function of a module whose docstring describes the measurement.
        arguments: arguments of the function.
    """

    measure: Callable[..., Tables]
    arguments: Mapping[str, Any]

    def jobs(self) -> Sequence[Job]:
        """List the one job, which runs alone since it may measure time."""
        return [Job(name=_TABLES, work=self.measure, arguments=self.arguments, alone=True)]

    def section(self, results: Mapping[str, Result]) -> Section:
        """Report the tables, below the docstring of the module."""
        module = inspect.getmodule(self.measure)
        title, _, text = (inspect.getdoc(module) or "").partition("\n")
        text = " ".join(text.split())
        return Section(title=title.rstrip("."), text=text, tables=results[_TABLES])


def refuse_unknown(what: str, names: Iterable[str], choices: Iterable[str]) -> None:
    """Refuse names that are not among the choices.

    Raises:
        UserError: if there are any; it lists the choices.
    """
    listed = list(choices)
    unknown = sorted(set(names) - set(listed))
    if unknown:
        raise UserError(
            f"There is no {what} {', '.join(unknown)}. Choose from: {', '.join(listed)}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Values of one quantity, measured with several seeds.

    Attributes:
        values: one value per seed, in the order of the seeds.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return mean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; 0 with one seed."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def __sub__(self, other: "Measured") -> "Measured":
        """Subtract seed by seed."""
        pairs = zip(self.values, other.values, strict=True)
        return Measured(values=tuple(a - b for a, b in pairs))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.deviation:.3f}"


def at_least(a: Measured, b: Measured, *, margin: float = 0.0) -> bool | None:
    """Judge whether `a` is at least as large as `b`, as far as the seeds can tell.

    The difference of each seed is a sample; its mean is told from the limit if it is two of its
    standard errors away from it.

    Args:
        a: values of the same seeds as `b`.
        b: reference values.
        margin: amount by which `a` may fall short and still count as being as large.

    Returns:
        None if they cannot be told apart, as with a single seed.
    """
    apart = a - b
    if len(apart.values) < 2:
        return None
    above = apart.mean + margin
    if abs(above) <= 2 * apart.deviation / sqrt(len(apart.values)):
        return None
    return above > 0


def finding(claim: str, a: Measured, b: Measured, *, margin: float = 0.0) -> Finding:
    """Judge the claim that `a` is at least as large as `b`; see `at_least`."""
    return Finding(claim=claim, holds=at_least(a, b, margin=margin), evidence=f"{a} against {b}")
