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
class Outcome:
    """End of a job of an experiment: a result, or the error because of which there is none."""

    experiment: str
    job: Job
    result: Result
    seconds: float
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Verdict on a claim, with the numbers behind it; None if these cannot tell."""

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
        """List all pieces of work."""

    def section(self, results: Mapping[str, Result]) -> Section:
        """Report on the results of all jobs, by their names."""


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
        """List the one job, which runs alone since it may measure time."""
        return [Job(name=_TABLES, work=self.measure, arguments=self.arguments, alone=True)]

    def section(self, results: Mapping[str, Result]) -> Section:
        """Report the tables."""
        described, _, _ = (inspect.getdoc(self.measure) or "").partition("\nArgs:")
        title, _, text = described.partition("\n")
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
    """Judge whether `a` is at least as large as `b`, as far as their common seeds can tell.

    The difference of each seed is a sample; its mean is told from the limit if it is two of its
    standard errors away from it. `a` may fall short by `margin` and still count as being as large.

    Returns:
        None if they cannot be told apart, as with a single seed.
    """
    apart = Measured(tuple(x - y for x, y in zip(a.values, b.values, strict=True)))
    above = apart.mean + margin
    if len(apart.values) < 2 or abs(above) <= 2 * apart.deviation / sqrt(len(apart.values)):
        return None
    return above > 0


def finding(claim: str, a: Measured, b: Measured, *, margin: float = 0.0) -> Finding:
    """Judge the claim that `a` is at least as large as `b`; see `at_least`."""
    return Finding(claim=claim, holds=at_least(a, b, margin=margin), evidence=f"{a} against {b}")
