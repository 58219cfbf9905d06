"""What a search space asks for: values for fields of a recipe, proposed by an Optuna trial."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pipelines.config.recipe import Recipe
from re2tal.errors import UserError
from sweeps.overrides import check, value_of

Primitive = None | bool | int | float | str


class Proposer(Protocol):
    """Proposes values: an `optuna.Trial`, or something that looks like one."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number in [low, high]."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        """A whole number in [low, high]."""

    def suggest_categorical(self, name: str, choices: Sequence[Primitive]) -> Any:
        """One of the choices."""


class Suggestions:
    """Gives a search space its values, and keeps what the trial is to train with.

    Every range is checked against the field's type when it is asked for, both of its ends; and the
    base recipe's own value must lie in it, because a sweep's first trial is the base recipe.

    Args:
        base: the recipe that is searched around.
        proposer: proposes values; None takes the base's own.

    Attributes:
        values: dotted name to value, all that differs from or equals the base's by suggestion.
        base_point: what an Optuna trial would have to propose to train the base recipe.
    """

    def __init__(self, base: Recipe, proposer: Proposer | None = None) -> None:
        self.values: dict[str, Any] = {}
        self.base_point: dict[str, Primitive] = {}
        self._base, self._proposer = base, proposer

    def log_float(self, name: str, low: float, high: float) -> float:
        """A number whose magnitude is searched, such as a learning rate.

        Args:
            name: dotted, of the field.
            low: smallest, above 0.
            high: largest.
        """
        own = self._in_range(name, low, high)
        return self._take(
            name, own, lambda proposer: proposer.suggest_float(name, low, high, log=True)
        )

    def number(self, name: str, low: float, high: float) -> float:
        """A number.

        Args:
            name: dotted, of the field.
            low: smallest.
            high: largest.
        """
        own = self._in_range(name, low, high)
        return self._take(name, own, lambda proposer: proposer.suggest_float(name, low, high))

    def integer(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        """A whole number.

        Args:
            name: dotted, of the field.
            low: smallest.
            high: largest.
            step: between two.
        """
        own = self._in_range(name, low, high)
        if (own - low) % step:
            raise UserError(
                f"The base's {name} of {own} is none of {low}, {low + step}, ... {high}."
            )
        return self._take(
            name, own, lambda proposer: proposer.suggest_int(name, low, high, step=step)
        )

    def choice(self, name: str, options: Sequence[Any] | Mapping[str, Any]) -> Any:
        """One of several values of whatever type; the base's own is among them in any case.

        Args:
            name: dotted, of the field.
            options: the values; with names for those that are long, such as whole components.
        """
        labelled = _labelled(options)
        own = value_of(self._base, name)
        if own not in labelled.values():
            labelled = {_label(own): own, **labelled}
        for value in labelled.values():
            check(self._base, name, value, self.values)
        (own_label,) = [label for label, value in labelled.items() if value == own][:1]
        label = self._propose(
            name, own_label, lambda proposer: proposer.suggest_categorical(name, [*labelled])
        )
        self.values[name] = labelled[label]
        return labelled[label]

    def set(self, name: str, value: Any) -> None:
        """A value that follows from others.

        Args:
            name: dotted, of the field.
            value: for it.
        """
        check(self._base, name, value, self.values)
        self.values[name] = value

    def _in_range(self, name: str, low: float, high: float) -> Any:
        for end in (low, high):
            check(self._base, name, end, self.values)
        own = value_of(self._base, name)
        if own is None or not low <= own <= high:
            raise UserError(
                f"The base's {name} of {own} is not in the range that is searched, {low:g} to "
                f"{high:g}: the first trial is the base recipe. Change either."
            )
        return own

    def _take(self, name: str, own: Any, propose: Callable[[Proposer], Any]) -> Any:
        self.values[name] = self._propose(name, own, propose)
        return self.values[name]

    def _propose(self, name: str, own: Primitive, propose: Callable[[Proposer], Any]) -> Any:
        if name in self.base_point:
            raise UserError(f"{name} is asked for twice.")
        self.base_point[name] = own
        return own if self._proposer is None else propose(self._proposer)


Space = Callable[[Suggestions, Recipe], None]
"""A search space: asks `Suggestions` for values, given the base recipe. What it asks for may depend
on values that it was given."""


def _labelled(options: Sequence[Any] | Mapping[str, Any]) -> dict[Any, Any]:
    if isinstance(options, Mapping):
        return {**options}
    return {_label(value): value for value in options}


def _label(value: Any) -> Primitive:
    return value if isinstance(value, Primitive) else str(value)
