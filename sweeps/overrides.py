"""Other values for fields of a recipe, by dotted name and with the fields' types."""

import dataclasses
import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from re2tal.errors import UserError

ConfigT = TypeVar("ConfigT")


def override(config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    """Returns a configuration with other values for some fields.

    Args:
        config: a nested frozen dataclass.
        values: by dotted name, such as `{"optim.clip": 0.5}`. A name may stand for a whole
            component; names of its fields then change those of the new one.

    Raises:
        UserError: if there is no such field, or the value is of another type.
        ValueError: if values that are of the right type do not go together.
    """
    for name, value in values.items():
        check(config, name, value, values)
    return _replaced(config, values)


def value_of(config: Any, name: str) -> Any:
    """The value of a field.

    Args:
        config: a nested dataclass.
        name: dotted.

    Raises:
        UserError: if there is no such field.
    """
    here = config
    for part in name.split("."):
        _require_field(here, part, name)
        here = getattr(here, part)
    return here


def check(config: Any, name: str, value: Any, others: Mapping[str, Any] | None = None) -> None:
    """Checks that a field exists and can have a value.

    Args:
        config: a nested dataclass.
        name: dotted.
        value: for the field.
        others: values of other fields that change with it; if one of them is the component that the
            field is in, it is the new component that has to have the field.

    Raises:
        UserError: if it does not, or cannot.
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
