"""Means over seeds, and whether two can be told apart."""

from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from pipelines.experiments.experiment import Finding


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The same thing measured with several seeds.

    Attributes:
        values: one a seed, in the order of the seeds.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return mean(self.values)

    @property
    def deviation(self) -> float:
        """The standard deviation of a single seed's value; 0 with one seed."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def __sub__(self, other: "Measured") -> "Measured":
        """By how much one exceeds the other, seed by seed."""
        pairs = zip(self.values, other.values, strict=True)
        return Measured(values=tuple(a - b for a, b in pairs))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.deviation:.3f}"


def at_least(a: Measured, b: Measured, *, margin: float = 0.0) -> bool | None:
    """Whether one is at least as large as the other, as far as the seeds can tell.

    The difference of each seed is a sample; its mean is told from the limit if it is two of its
    standard errors away from it.

    Args:
        a: with the same seeds as `b`.
        b: what it is compared with.
        margin: by how much `a` may fall short and still count as being as large.

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
    """The claim that one is at least as large as the other.

    Args:
        claim: in a sentence.
        a: as of `at_least`.
        b: likewise.
        margin: likewise.
    """
    return Finding(claim=claim, holds=at_least(a, b, margin=margin), evidence=f"{a} against {b}")
