"""Recipe as commented Python, which `train.py my_recipe.py` takes."""

import shlex
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from typing import Any

from pipelines.config.recipe import Recipe
from pipelines.core.checkout import script_command
from pipelines.training.advice import Advice
from pipelines.training.facts import Facts, Machine, facts_of
from re2tal.backbones.table import entry_of

_WIDTH = 98
_INDENT = "    "


def written(advice: Advice, facts: Facts, machine: Machine) -> str:
    """Write a recipe and the reasons for it; executed, it gives the same recipe."""
    recipe = advice.recipe
    used: dict[str, set[str]] = defaultdict(set)
    used[Recipe.__module__].add(Recipe.__name__)
    body = [*_call(recipe, "", advice, used)]
    imports = [line for module in sorted(used) for line in _import(module, sorted(used[module]))]
    head = [
        *_comment("A recipe made by pipelines/new_recipe.py: change what you know better."),
        "#",
        *(line for fact in facts_of(facts) for line in _comment(fact)),
        *_comment(f"machine: {machine.described}"),
        *_comment(f"memory: {advice.reasons['memory']}"),
        *(line for text in advice.warnings for line in _comment(f"warning: {text}")),
        "#",
        *_comment("train: " + _command("train", "my_recipe.py")),
        *_comment(
            "detect: " + _command("detect", "--model RUN_ID --videos NEW.mp4 --output found")
        ),
    ]
    function = [
        f"def {recipe.name}() -> Recipe:",
        f'{_INDENT}"""Settings for this data set, each with its reason."""',
        f"{_INDENT}return {body[0]}",
        *(f"{_INDENT}{line}" for line in body[1:]),
    ]
    return "\n".join([*head, "", *imports, "", "", *function]) + "\n"


def _command(script: str, rest: str) -> str:
    return f"{shlex.join(script_command(f'pipelines/{script}.py'))} {rest}"


def _import(module: str, names: Sequence[str]) -> Iterator[str]:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= _WIDTH:
        yield line
        return
    yield f"from {module} import ("
    yield from (f"{_INDENT}{name}," for name in names)
    yield ")"


def _comment(text: str, indent: str = "", *, deeper: int = 0) -> Iterator[str]:
    """Yield the lines of a wrapped comment, which is still to be indented by `deeper` levels.

    Characters that UTF-8 cannot encode, such as in names of files, are escaped.
    """
    shown = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    prefix = f"{indent}# "
    yield from textwrap.wrap(
        shown,
        _WIDTH - 4 * deeper,
        initial_indent=prefix,
        subsequent_indent=f"{prefix}  ",
        break_on_hyphens=False,
    )


def _call(value: Any, path: str, advice: Advice, used: Mapping[str, set[str]]) -> Iterator[str]:
    """Yield the call that makes a dataclass: fields that have a reason or differ from defaults."""
    if path == "model.backbone":
        make = entry_of(advice.backbone).make
        used[make.__module__].add(make.__name__)
        yield f"{make.__name__}()"
        return
    used[type(value).__module__].add(type(value).__name__)
    yield f"{type(value).__name__}("
    for one in fields(value):
        part = getattr(value, one.name)
        name = f"{path}.{one.name}".removeprefix(".")
        if part == _default(one) and name not in advice.reasons:
            continue
        if name in advice.reasons:
            yield from _comment(advice.reasons[name], _INDENT, deeper=name.count(".") + 1)
        constant = _constant(part, advice) if name == "model.weights" else ""
        if constant:
            used[entry_of(advice.backbone).make.__module__].add(constant)
        lines = [*_call(part, name, advice, used)] if is_dataclass(part) else []
        lines = lines or [constant or _literal(part)]
        yield f"{_INDENT}{one.name}={lines[0]}" + "," * (len(lines) == 1)
        yield from (f"{_INDENT}{line}" for line in lines[1:-1])
        if len(lines) > 1:
            yield f"{_INDENT}{lines[-1]},"
    yield ")"


def _constant(value: Any, advice: Advice) -> str:
    """Return the name of the constant in the backbone's module that holds these weights, if any."""
    module = import_module(entry_of(advice.backbone).make.__module__)
    names = (name for name, known in vars(module).items() if name.isupper() and known == value)
    return next(names, "")


def _literal(value: Any) -> str:
    text = repr(value)
    plain = isinstance(value, str) and not {'"', "'"} & set(value)
    return f'"{text[1:-1]}"' if plain else text


def _default(one: Any) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()
