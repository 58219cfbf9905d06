"""Choices by name on a command line: recipes, backbones, and the user's own modules."""

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import getmembers, isfunction
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

from re2tal.backbones.table import backbones, entry_of
from re2tal.errors import UserError

# Folders of the user's own modules that the command line imported.
_FOLDERS: set[Path] = set()

RecipeT = TypeVar("RecipeT")


def take(option: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the values of an option, which may be repeated, from the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="values", action="append", default=[])
    known, rest = parser.parse_known_args(arguments)
    return known.values, rest


def import_own(arguments: Sequence[str]) -> list[str]:
    """Import the modules that `--import` names, for example one with a localizer.

    Returns:
        The other arguments.

    Raises:
        UserError: a module does not exist.
    """
    references, rest = take("--import", arguments)
    for reference in references:
        _imported(reference)
    return rest


def _imported(reference: str) -> ModuleType:
    """Import the module that `my_package.my_module` or `path/to/file.py` names."""
    path = Path(reference).resolve() if reference.endswith(".py") else None
    if path is not None and not path.is_file():
        raise UserError(f"There is no file {reference}.")
    name = path.stem if path else reference
    sys.path.append(str(path.parent if path else Path.cwd()))  # at the end: shadows no other module
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # an import inside the user's module failed
        raise UserError(
            f"There is no module {name!r}: give one that exists in this folder or the environment, "
            "or the path of its file (file.py)."
        ) from error
    if path is not None and Path(str(module.__file__)).resolve() != path:
        raise UserError(
            f"{reference} has the name of another module, {module.__file__}: rename the file."
        )
    place = _place(sys.modules[name.partition(".")[0]])
    if place and not {"site-packages", "dist-packages"} & set(place.parts):  # not an installed one
        _FOLDERS.add(place.parent)
    return module


def _place(module: ModuleType) -> Path | None:
    """Return the file of a top-level module, or the folder of a package; None if built in."""
    places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None)]
    return Path(places[0]) if places[0] else None


def own_code() -> list[str]:
    """List the user's own files and packages: those named, and imports from their folders."""
    ours = ("__main__", "re2tal", "pipelines", "sweeps")
    places = [
        _place(module)
        for name, module in list(sys.modules.items())
        if "." not in name and name not in ours
    ]
    return sorted({str(place) for place in places if place and place.parent in _FOLDERS})


def recipe_named(
    name: str, recipes: Mapping[str, Callable[[], RecipeT]], kind: type[RecipeT]
) -> RecipeT:
    """Return a built-in recipe, or one of the user's own.

    Args:
        name: a key of `recipes`, `my_module:my_recipe`, `file.py:my_recipe`, or `file.py` with
            exactly one function that is annotated to return `kind`.
        recipes: built-in recipes by name.
        kind: class of the recipe.

    Raises:
        UserError: there is no recipe of that name, or it is of another class.
    """
    if name in recipes:
        return recipes[name]()
    reference, colon, function = name.partition(":")
    if not colon and not name.endswith(".py"):
        raise UserError(
            f"There is no recipe {name!r}. Choose one of: {', '.join(recipes)}; or give your own "
            "as my_module:my_recipe or file.py:my_recipe."
        )
    module = _imported(reference)
    found: Any = getattr(module, function, None) if colon else _only_recipe(module, kind)
    if not callable(found):
        raise UserError(f"{reference} has no function {function!r}.")
    recipe = found()
    if not isinstance(recipe, kind):
        raise UserError(f"{name} returns a {type(recipe).__name__}, not a {kind.__name__}.")
    return recipe


def _only_recipe(module: ModuleType, kind: type[Any]) -> Callable[[], Any]:
    makes = [
        function
        for _, function in getmembers(module, isfunction)
        if function.__module__ == module.__name__ and get_type_hints(function).get("return") is kind
    ]
    if len(makes) != 1:
        listed = ", ".join(make.__name__ for make in makes) or "none"
        raise UserError(
            f"{module.__file__} needs one function that is annotated to return a {kind.__name__}, "
            f"but has {listed}: name one as {Path(str(module.__file__)).name}:my_recipe."
        )
    return makes[0]


def with_backbone(recipe: RecipeT, arguments: Sequence[str], option: str) -> tuple[RecipeT, Any]:
    """Set a recipe's backbone and its normalisation to those that an option names.

    Args:
        recipe: recipe of a detector or a classifier.
        arguments: command line without the program's name.
        option: name of the option, such as "--model.backbone".

    Returns:
        The recipe, and the other arguments, which may still override its fields.

    Raises:
        UserError: the table has no such backbone.
    """
    names, rest = take(option, arguments)
    if names:
        entry = entry_of(names[-1])
        model: Any = recipe.model  # type: ignore[attr-defined]
        chosen = replace(model, backbone=entry.make(), mean=entry.mean, std=entry.std)
        recipe = replace(recipe, model=chosen)  # type: ignore[type-var]
    return recipe, rest


def choices_help(option: str) -> str:
    """Return a script's help on `option`, such as "--model.backbone", and on `--import`."""
    return (
        f"{option} NAME selects another backbone, with the normalisation that it was pretrained "
        f"with: {', '.join(backbones())}. --import MODULE_OR_FILE imports your own code first."
    )
