"""Search spaces: ask for values of a recipe's fields, and set them by dotted name."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from pipelines.config.recipe import Recipe
from re2tal.errors import UserError

ConfigT = TypeVar("ConfigT")


def override(config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    """Return a configuration with other values for some fields.

    Args:
        config: nested frozen dataclass.
        values: values by dotted name, such as `{"optim.clip": 0.5}`. A name may stand for a whole
            component; dotted names below it then set fields of the new component.

    Raises:
        UserError: there is no such field, or the value has another type.
        ValueError: values of the right types contradict one another.
    """
    for name, value in values.items():
        check(config, name, value, values)
    replaced: ConfigT = _replaced(config, values)
    return replaced


def value_of(config: Any, name: str) -> Any:
    """Return the value of a field of a nested dataclass, by its dotted name.

    Raises:
        UserError: there is no such field.
    """
    here = config
    for part in name.split("."):
        _require_field(here, part, name)
        here = getattr(here, part)
    return here


def check(config: Any, name: str, value: Any, others: Mapping[str, Any] | None = None) -> None:
    """Check that a field exists and can have a value.

    Args:
        config: nested dataclass.
        name: dotted name of the field.
        value: value to check.
        others: values of other fields that change at the same time. If one of them replaces the
            component with the field, the new component must have the field.

    Raises:
        UserError: there is no such field, or it cannot have the value.
    """
    *path, last = name.split(".")
    owner = config
    for depth, part in enumerate(path, start=1):
        _require_field(owner, part, name)
        whole = ".".join(path[:depth])
        owner = (others or {}).get(whole, getattr(owner, part))
    _require_field(owner, last, name)
    try:
        adapter = _adapter(type(owner), last)  # type: ignore[arg-type]
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        why = "; ".join(f"{problem['msg']}" for problem in error.errors()[:3])
        raise UserError(f"{name} cannot be {value!r}: {why}.") from error


def _replaced(config: Any, values: Mapping[str, Any]) -> Any:
    whole = {name: value for name, value in values.items() if "." not in name}
    within: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        first, dot, rest = name.partition(".")
        if dot:
            within.setdefault(first, {})[rest] = value
    # after whole components: dotted names set fields of the new component
    for first, parts in within.items():
        whole[first] = _replaced(whole.get(first, getattr(config, first)), parts)
    return dataclasses.replace(config, **whole) if whole else config


def _require_field(owner: Any, part: str, name: str) -> None:
    known = [field.name for field in dataclasses.fields(owner)] if _is_config(owner) else []
    if part in known:
        return
    kind = type(owner).__name__
    if not known:
        raise UserError(f"There is no field {name}: a {kind} has no fields.")
    close = difflib.get_close_matches(part, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}."
    raise UserError(f"There is no field {name}: {kind} has no {part!r}; {hint}")


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


@cache
def _adapter(kind: Any, field: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(kind, include_extras=True)[field])


Primitive = None | bool | int | float | str


class Proposer(Protocol):
    """Source of proposals: an `optuna.Trial`, or an object with the same methods."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Propose a number in [low, high]."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        """Propose a whole number in [low, high]."""

    def suggest_categorical(self, name: str, choices: Sequence[Primitive]) -> Any:
        """Propose one of the choices."""


class Suggestions:
    """Source of values for a search space, and record of the values that the trial trains with.

    Both ends of a range are checked against the field's type. The base recipe's own value must lie
    in the range, because a sweep's first trial is the base recipe.

    Args:
        base: base recipe of the search.
        proposer: source of proposals; None uses the base's own values.

    Attributes:
        values: value of each requested field, by dotted name.
        base_point: proposals with which an Optuna trial trains the base recipe.
    """

    def __init__(self, base: Recipe, proposer: Proposer | None = None) -> None:
        self.values: dict[str, Any] = {}
        self.base_point: dict[str, Primitive] = {}
        self._base, self._proposer = base, proposer

    def log_float(self, name: str, low: float, high: float) -> float:
        """Ask for a positive number on a logarithmic scale, such as a learning rate."""
        own = self._in_range(name, low, high)
        value: float = self._take(
            name, own, lambda proposer: proposer.suggest_float(name, low, high, log=True)
        )
        return value

    def number(self, name: str, low: float, high: float) -> float:
        """Ask for a number on a linear scale."""
        own = self._in_range(name, low, high)
        value: float = self._take(
            name, own, lambda proposer: proposer.suggest_float(name, low, high)
        )
        return value

    def integer(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        """Ask for a whole number: low, low + step, ... high."""
        own = self._in_range(name, low, high)
        if (own - low) % step:
            raise UserError(
                f"The base's {name} of {own} is not one of {low}, {low + step}, ... {high}."
            )
        value: int = self._take(
            name, own, lambda proposer: proposer.suggest_int(name, low, high, step=step)
        )
        return value

    def choice(self, name: str, options: Sequence[Any] | Mapping[str, Any]) -> Any:
        """Ask for one of several values of any type; the base's own value is always included.

        Args:
            name: dotted name of the field.
            options: values, or a mapping from short names to long values such as components.
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
        """Set a field to a value that follows from those of other fields."""
        check(self._base, name, value, self.values)
        self.values[name] = value

    def _in_range(self, name: str, low: float, high: float) -> Any:
        for end in (low, high):
            check(self._base, name, end, self.values)
        own = value_of(self._base, name)
        if own is None or not low <= own <= high:
            raise UserError(
                f"The base's {name} of {own} is not in the search range, {low:g} to {high:g}, "
                "although the first trial is the base recipe. Change one of the two."
            )
        return own

    def _take(self, name: str, own: Any, propose: Callable[[Proposer], Any]) -> Any:
        self.values[name] = self._propose(name, own, propose)
        return self.values[name]

    def _propose(self, name: str, own: Primitive, propose: Callable[[Proposer], Any]) -> Any:
        if name in self.base_point:
            raise UserError(f"The search space asks for {name} twice.")
        self.base_point[name] = own
        return own if self._proposer is None else propose(self._proposer)


Space = Callable[[Suggestions, Recipe], None]
"""Search space: a function that asks `Suggestions` for values, given the base recipe. A request may
depend on values received before."""


def _labelled(options: Sequence[Any] | Mapping[str, Any]) -> dict[Any, Any]:
    if isinstance(options, Mapping):
        return {**options}
    return {_label(value): value for value in options}


def _label(value: Any) -> Primitive:
    return value if isinstance(value, Primitive) else str(value)
