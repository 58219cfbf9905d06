"""Parts of a detector as JSON: the name of a class and its fields.

`{"class": "re2tal.localizers.actionformer:ActionFormerConfig", "width": 512, ...}`. Reading a file
must not run code chosen by the file: classes are looked up only in this package and in modules that
the program has already imported.
"""

import dataclasses
import importlib
import sys
from functools import partial
from inspect import signature
from typing import Any

from pydantic import GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from re2tal.json_files import in_words, problem_of

_CLASS = "class"


class Component:
    """Marker of a field that holds such a part: `Annotated[LocalizerConfig, Component()]`.

    The value may be any frozen dataclass whose method `build` takes the protocol's arguments.
    """

    def __get_pydantic_core_schema__(
        self,
        source: Any,
        handler: GetCoreSchemaHandler,
    ) -> CoreSchema:
        """Return the schema by which pydantic reads and writes such a field."""
        return core_schema.no_info_plain_validator_function(
            partial(_read, source),
            serialization=core_schema.plain_serializer_function_ser_schema(_write),
        )


def _write(config: Any) -> dict[str, Any]:
    kind = type(config)
    if kind.__module__ == "__main__":
        raise ValueError(
            f"{kind.__qualname__} is defined in a script, which cannot be imported again: move it "
            "to a module, so that a saved detector can name it."
        )
    fields: dict[str, Any] = TypeAdapter(kind).dump_python(config, mode="json")
    return {_CLASS: f"{kind.__module__}:{kind.__qualname__}", **fields}


def _read(protocol: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(value) and hasattr(value, "build"):
        return value  # given in Python, not read from a file
    if not isinstance(value, dict):
        raise ValueError(f"must be an object with a class and its fields, not {value!r}")  # noqa: TRY004 - pydantic takes these
    fields = dict(value)
    name = str(fields.pop(_CLASS, ""))
    kind = _find(name)
    if not _takes(kind.build, len(signature(protocol.build).parameters)):
        raise ValueError(f"{name!r} is not a {protocol.__name__}: its build has other arguments")
    unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"{name} has no {', '.join(unknown)}: was it saved by a newer re2tal?")
    try:
        return TypeAdapter(kind).validate_python(fields)
    except ValidationError as error:
        problems = (
            problem_of(details, in_words((kind.__name__, *details["loc"])))
            for details in error.errors()
        )
        raise ValueError("; ".join(problems)) from error


def _takes(build: Any, number: int) -> bool:
    """Tell if an unbound method can be called with this number of arguments."""
    try:
        signature(build).bind(*[None] * number)
    except TypeError:
        return False
    return True


def _find(name: str) -> Any:
    """Find the dataclass of a name "module:class".

    Raises:
        ValueError: there is no such dataclass, or its module was not imported.
    """
    module_name, _, class_name = name.partition(":")
    if module_name.startswith("re2tal."):
        try:
            importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"re2tal has no module {module_name!r}: was the detector saved by a newer re2tal?"
            ) from error
    if module_name not in sys.modules:
        raise ValueError(f"{name!r} is defined outside re2tal: import its module first")
    found = getattr(sys.modules[module_name], class_name, None)
    if not (
        dataclasses.is_dataclass(found) and isinstance(found, type) and hasattr(found, "build")
    ):
        raise ValueError(f"{name!r} is not a configuration that builds something")
    return found
