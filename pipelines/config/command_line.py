"""Command line that names a recipe and overrides its fields; errors without a stack trace."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, fields, is_dataclass, make_dataclass
from functools import reduce
from typing import Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import tyro

from pipelines.config.choices import choices_help, import_own, recipe_named, with_backbone
from re2tal.errors import UserError

RecipeT = TypeVar("RecipeT")

# Fields of a recipe that most runs need: those that `--help` shows, unlike `--help-all`.
_FIRST = (
    "data.annotations",
    "data.videos",
    "data.features",
    "data.training",
    "data.validation",
    "data.size",
    "data.window.frames",
    "data.window.fps",
    "data.clip.frames",
    "data.clip.fps",
    "model.weights",
    "model.tuning",
    "finetune.epochs",
    "epochs",
    "batch_size",
    "output",
)


@contextmanager
def told_shortly(*, failure: str | None = None) -> Iterator[None]:
    """End the program with one message instead of a stack trace if the block raises a `UserError`.

    Args:
        failure: sentence before the message of a failed Ray task or actor; with None such an error
            propagates.
    """
    try:
        yield
    except UserError as problem:
        sys.exit(_with_notes(f"error: {problem}", problem))
    except Exception as failed:
        # imported here: `--help` needs neither
        from ray.exceptions import OutOfMemoryError, RayError
        from ray.train import WorkerGroupError

        if isinstance(failed, OutOfMemoryError):
            sys.exit(_with_notes(f"error: {_out_of_memory(str(failed))}", failed))
        if isinstance(failed, WorkerGroupError):
            first = next(iter(failed.worker_failures.values()))
            sys.exit(_with_notes(f"error: a training worker failed.\n{first}", failed))
        if failure is None or not isinstance(failed, RayError):
            raise
        sys.exit(_with_notes(f"error: {failure}\n{failed}", failed))


def _out_of_memory(report: str) -> str:
    """Shorten Ray's report of fifty lines to what was used, by whom, and what to do."""
    used = re.search(r"Memory on the node .*? limit", report)
    most = re.search(r"Top \d+ memory users:.*\n\d+\s+(\S+)\s+(.+)", report)
    sentences = [
        "a machine ran out of memory, and Ray ended processes to keep it alive.",
        re.sub(r", ID: \w+", "", f"{used[0]}.") if used else report.partition("\n")[0],
        f"The largest process has {most[1]} GB: {most[2]}." if most else "",
        "Close other programs, or give fewer workers (--scale.workers) smaller batches. The same",
        "command then continues where this one stopped.",
    ]
    return " ".join(filter(None, sentences))


def _with_notes(message: str, error: Exception) -> str:
    """Append an error's notes, one a line, such as a problem with tracking on the way out."""
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
        prefix: prefix of the options for the recipe's fields in that configuration.

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
    shown, more = default, ""
    if {"-h", "--help"} & set(rest):
        shown = _first_options(default, prefix.removeprefix("--"))
        more = (
            " --help-all lists every option, including those of optimizer, localizer and cluster."
        )
    return tyro.cli(
        type(shown),
        default=shown,
        args=["--help" if argument == "--help-all" else argument for argument in rest],
        prog=f"{script} [RECIPE]",
        description=(
            f"{description}\n\nRecipes (the first argument; by default toy; your own as "
            f"my_module:my_recipe or file.py):\n\n{listed}\n\n{choices_help(option)}"
            f"\n\nThe defaults below are those of {name}.{more}"
        ),
    )


def _first_options(default: Any, prefix: str) -> Any:
    """Return an object with the few fields of a configuration that most runs need, for `--help`.

    Args:
        default: configuration of a program.
        prefix: path of the recipe in it, such as "base.".
    """
    own = [one.name for one in fields(default) if not is_dataclass(getattr(default, one.name))]
    wanted = own if prefix else []
    wanted += [prefix + name for name in _FIRST if name not in own or not prefix]
    found = []
    for path in wanted:
        *parents, name = path.split(".")
        owner = reduce(_field, parents, default)
        if _field(owner, name) is owner or (parents and owner is default):
            continue  # only other kinds of recipes have this field
        option = tyro.conf.arg(name=path.replace("_", "-"), help=_documented(type(owner), name))
        hint = get_type_hints(type(owner), include_extras=True)[name]
        value = field(default=getattr(owner, name))
        found.append((path.replace(".", "_"), Annotated[hint, option], value))
    return make_dataclass("FirstOptions", found, frozen=True, kw_only=True)()


def _field(owner: Any, name: str) -> Any:
    """Return the value of a field; if the owner has no such field, return the owner itself."""
    return getattr(owner, name) if name in {one.name for one in fields(owner)} else owner


def _documented(kind: type, name: str) -> str:
    """Return a field's description in the docstring of its class or of a base class."""
    for base in kind.__mro__:
        for one in docstring_parser.parse(base.__doc__ or "").params:
            if one.arg_name == name:
                return " ".join((one.description or "").split())
    return ""
