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
"""Row of a table, by column. Values that are lists are kept in files but not printed."""

Tables = dict[str, list[Row]]
"""Rows by the title of their table; all rows of a table have the same columns."""

Result = Any
"""Result of a job, of any type that JSON can hold."""


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Unit of work for one process.

    Attributes:
        name: title, unique within the experiment.
        work: function at the top level of a module, so that any process can import it.
        arguments: arguments that JSON can hold; a kept result is valid while they stay the same.
        alone: no other job runs at the same time, because this one measures time or spreads over
            the cluster.
        spreads: the job requests the cluster's resources itself, as Ray Train does.
    """

    name: str
    work: Callable[..., Result]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    spreads: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Outcome of a job: its result, or the error of a failed job."""

    experiment: str
    job: Job
    result: Result
    seconds: float
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Verdict on a claim, with its evidence; `holds` is None if the numbers cannot tell."""

    claim: str
    holds: bool | None
    evidence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Report of an experiment.

    Attributes:
        text: description of the measurement: data, sizes, seeds.
        figures: pictures by name, without a file's ending.
        metrics: numbers for MLflow.
    """

    title: str
    text: str
    tables: Tables
    findings: Sequence[Finding] = ()
    figures: Mapping[str, "Figure"] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Experiment(Protocol):
    """Configured experiment."""

    def jobs(self) -> Sequence[Job]:
        """List all jobs."""

    def section(self, results: Mapping[str, Result]) -> Section:
        """Report on the results of all jobs, given by name."""


@runtime_checkable
class Prepares(Protocol):
    """Experiment on data that the project makes."""

    def prepare(self) -> None:
        """Make the data if they are missing."""


_TABLES = "tables"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Experiment of one job, whose result is tables.

    Attributes:
        measure: function of a module whose docstring is the title and the text of the report.
        arguments: arguments of the function.
    """

    measure: Callable[..., Tables]
    arguments: Mapping[str, Any]

    def jobs(self) -> Sequence[Job]:
        """List the single job, which runs alone because it may measure time."""
        return [Job(name=_TABLES, work=self.measure, arguments=self.arguments, alone=True)]

    def section(self, results: Mapping[str, Result]) -> Section:
        """Report the tables."""
        described, _, _ = (inspect.getdoc(self.measure) or "").partition("\nArgs:")
        title, _, text = described.partition("\n")
        text = " ".join(text.split())
        return Section(title=title.rstrip("."), text=text, tables=results[_TABLES])


def refuse_unknown(what: str, names: Iterable[str], choices: Iterable[str]) -> None:
    """Raise if names are not among the choices.

    Raises:
        UserError: with the unknown names and the choices.
    """
    listed = list(choices)
    unknown = sorted(set(names) - set(listed))
    if unknown:
        raise UserError(
            f"There is no {what} {', '.join(unknown)}. Choose from: {', '.join(listed)}."
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """Values of one quantity, one for each seed, in the order of the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return mean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; 0 with one seed."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.deviation:.3f}"


def at_least(a: Measured, b: Measured, *, margin: float = 0.0) -> bool | None:
    """Judge whether `a` is at least as large as `b`, from their differences seed by seed.

    The mean difference decides if it is more than two of its standard errors away from the limit.
    `a` may fall short by `margin` and still count as being as large.

    Returns:
        The verdict, or None if the values do not decide, for example with a single seed.
    """
    apart = Measured(tuple(x - y for x, y in zip(a.values, b.values, strict=True)))
    above = apart.mean + margin
    if len(apart.values) < 2 or abs(above) <= 2 * apart.deviation / sqrt(len(apart.values)):
        return None
    return above > 0


def finding(claim: str, a: Measured, b: Measured, *, margin: float = 0.0) -> Finding:
    """Judge the claim that `a` is at least as large as `b`; see `at_least`."""
    return Finding(claim=claim, holds=at_least(a, b, margin=margin), evidence=f"{a} against {b}")
