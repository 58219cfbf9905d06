"""Constraints that the best trial of a sweep must satisfy, such as `memory <= 20GiB`."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.core.metric_names import MAP, MEMORY
from re2tal.memory.fit import parse_size
from re2tal.memory.live import MEGABYTE

HOST_MEMORY, SPEED = "memory/rss_peak_mb", "train/frames_per_second"
SECONDS = "time_total_s"  # Ray Tune's metric, which includes the start of the trial's processes
MEASURED = "measured"  # attribute of a trial: its measures by name

_DURATIONS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def _seconds(text: str) -> float:
    number, unit = re.fullmatch(r"([^a-z]*)([a-z]*)", text).groups()  # type: ignore[union-attr]
    return float(number) * _DURATIONS[unit]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """Measure of a trial that a constraint may bound.

    Attributes:
        metric: name of the metric that a trial reports at its end.
        unit: unit of the metric, for tables.
        read: function that parses a limit, with its unit, into the metric's unit.
        example: example of a limit, for messages.
    """

    metric: str
    unit: str = ""
    read: Callable[[str], float] = float
    example: str


def _megabytes(text: str) -> float:
    return parse_size(text) / MEGABYTE


MEASURES = {
    "mAP": Measure(metric=MAP, example="0.4"),
    "memory": Measure(metric=MEMORY, unit="MB", read=_megabytes, example="20GiB"),
    "host_memory": Measure(metric=HOST_MEMORY, unit="MB", read=_megabytes, example="60GiB"),
    "frames_per_second": Measure(metric=SPEED, example="300"),
    "time": Measure(metric=SECONDS, unit="s", read=_seconds, example="90min"),
}
"""Measures of a trial by the names that constraints use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """Bound on a measure.

    Attributes:
        text: the constraint as the user wrote it.
        name: name of the measure.
        side: "<=" for an upper bound, ">=" for a lower one.
        limit: the bound, in the unit of the measure's metric.
    """

    text: str
    name: str
    side: Literal["<=", ">="]
    limit: float

    @classmethod
    def of(cls, text: str) -> "Constraint":
        """Read a constraint such as `memory <= 20GiB`.

        Raises:
            ValueError: trials have no such measure, or its limit cannot be parsed.
        """
        found = re.fullmatch(r"\s*([\w/.-]+)\s*(<=|>=)\s*(\S.*?)\s*", text)
        if found is None:
            raise ValueError(
                f"--constraint {text!r} is not NAME <= LIMIT or NAME >= LIMIT, in quotes: "
                f"{_examples()}."
            )
        name, side, limit = found.groups()
        if name not in MEASURES:
            raise ValueError(
                f"--constraint {text!r}: trials have no measure {name!r}. Use one of: "
                f"{_examples()}."
            )
        try:
            bound = MEASURES[name].read(limit)
        except (KeyError, ValueError) as error:
            reason = f" ({error})" if isinstance(error, ValueError) else ""
            raise ValueError(
                f"--constraint {text!r}: {limit!r} is not a limit of {name}{reason}. Write it as "
                f"{MEASURES[name].example}."
            ) from error
        return cls(text=text, name=name, side="<=" if side == "<=" else ">=", limit=bound)

    def excess(self, value: float) -> float:
        """Return the violation as a share of the limit; 0 or less if the constraint holds."""
        over = value - self.limit if self.side == "<=" else self.limit - value
        return over / abs(self.limit) if self.limit else over


def _examples() -> str:
    return ", ".join(f"{name} (as {one.example})" for name, one in MEASURES.items())


def measured(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the measures, by name, in the last report of a trial."""
    found = {name: result.get(one.metric) for name, one in MEASURES.items()}
    return {
        name: float(value)
        for name, value in found.items()
        if value is not None and math.isfinite(value)
    }


def excesses(constraints: Sequence[Constraint], values: Mapping[str, float]) -> dict[str, float]:
    """Return the constraints' values for Optuna; a value above 0 is a violation.

    A measure that a trial did not report counts as a violation.
    """
    return {
        one.text: one.excess(values[one.name]) if one.name in values else 1.0 for one in constraints
    }
