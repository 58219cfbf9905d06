"""Command line that names a recipe and overrides its fields; one message where a program fails."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import tyro

from pipelines.config.choices import choices_help, import_own, recipe_named, with_backbone
from re2tal.errors import UserError

RecipeT = TypeVar("RecipeT")


@contextmanager
def told_shortly(*, failure: str | None = None) -> Iterator[None]:
    """End the program with one message instead of a stack where its block raises a `UserError`.

    Args:
        failure: sentence before the message of a failed Ray task or actor; None lets such an error
            pass through.
    """
    try:
        yield
    except UserError as problem:
        sys.exit(_with_notes(f"error: {problem}", problem))
    except Exception as failed:
        # imported here, because `--help` needs neither
        from ray.exceptions import RayError
        from ray.train import WorkerGroupError

        if isinstance(failed, WorkerGroupError):
            first = next(iter(failed.worker_failures.values()))
            sys.exit(_with_notes(f"error: a training worker failed.\n{first}", failed))
        if failure is None or not isinstance(failed, RayError):
            raise
        sys.exit(_with_notes(f"error: {failure}\n{failed}", failed))


def _with_notes(message: str, error: Exception) -> str:
    """Add what else went wrong on the way out, such as tracking, in lines of their own."""
    return "\n".join([message, *getattr(error, "__notes__", ())])


def parse_recipe(
    arguments: Sequence[str],
    recipes: Mapping[str, Callable[[], RecipeT]],
    kind: type[RecipeT],
    *,
    script: str,
    description: str,
    finish: Callable[[RecipeT], Any] = lambda recipe: recipe,
    prefix: str = "--",
) -> Any:
    """Read a recipe's name and overrides of its fields from the command line.

    Args:
        arguments: command line without the program's name.
        recipes: built-in recipes by name; "toy" is taken if none is named.
        kind: class of the recipes.
        script: file name of the program.
        description: text above the help.
        finish: function that makes the program's configuration from a recipe.
        prefix: start of the options for the recipe's fields in that configuration.

    Raises:
        UserError: there is no such recipe, backbone or module.
    """
    name, rest = ("toy", import_own(arguments))
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
    option = f"{prefix}model.backbone"
    recipe, rest = with_backbone(recipe_named(name, recipes, kind), rest, option)
    default = finish(recipe)
    listed = "\n\n".join(
        f"{key}: {(make.__doc__ or '').splitlines()[0]}" for key, make in recipes.items()
    )
    return tyro.cli(
        type(default),
        default=default,
        args=rest,
        prog=f"{script} [RECIPE]",
        description=(
            f"{description}\n\nRecipes (the first argument; toy if left out; one of your own is "
            f"my_module:my_recipe or file.py):\n\n{listed}\n\n{choices_help(option)}"
            f"\n\nThe defaults below are those of {name}."
        ),
    )
