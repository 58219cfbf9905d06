"""A command line that names a recipe and overrides fields of it, and how its program ends."""

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import ray.train
import tyro
from ray.exceptions import RayError

from re2tal.errors import UserError

_KNOCK_SECONDS = 5.0


def require_cluster() -> None:
    """Ends a program in seconds whose cluster is gone.

    Raises:
        UserError: if nothing answers at `RAY_ADDRESS`.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if problem := unreachable(address):
        raise UserError(
            f"The cluster at {address} (RAY_ADDRESS) cannot be joined ({problem}). Start it (ray "
            "start --head), correct the variable, or unset it to use this machine alone."
        )


def unreachable(address: str) -> str:
    """Knocks at a cluster's address: Ray itself would wait for minutes, and say nothing.

    Args:
        address: as in `RAY_ADDRESS`.

    Returns:
        Why nothing answers; empty if something does, or the address is no host and port.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not host or not port.isdigit():
        return ""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS):
            return ""
    except OSError as error:
        return str(error) or type(error).__name__


RecipeT = TypeVar("RecipeT")


@contextmanager
def told_shortly(*, failure: str | None = None) -> Iterator[None]:
    """End the program with one message instead of a stack where its block raises a `UserError`.

    Args:
        failure: sentence before the message of a Ray task or actor that failed; without it such an
            error passes through.
    """
    try:
        yield
    except UserError as problem:
        sys.exit(f"error: {problem}")
    except ray.train.WorkerGroupError as failed:
        first = next(iter(failed.worker_failures.values()))
        sys.exit(f"error: a training worker failed.\n{first}")
    except RayError as failed:
        if failure is None:
            raise
        sys.exit(f"error: {failure}\n{failed}")


def parse_recipe(
    arguments: Sequence[str],
    recipes: Mapping[str, Callable[[], RecipeT]],
    *,
    script: str,
    description: str,
) -> RecipeT:
    """Reads a recipe's name and overrides of its fields from the command line.

    Args:
        arguments: without the program's name.
        recipes: by name; "toy" is taken if none is named.
        script: the program's name.
        description: what the program does.
    """
    name, rest = ("toy", list(arguments))
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
    if name not in recipes:
        sys.exit(f"There is no recipe {name!r}. Choose one of: {', '.join(recipes)}.")
    listed = "\n\n".join(
        f"{key}: {(make.__doc__ or '').splitlines()[0]}" for key, make in recipes.items()
    )
    default = recipes[name]()
    return tyro.cli(
        type(default),
        default=default,
        args=rest,
        prog=f"{script} [RECIPE]",
        description=(
            f"{description}\n\nRecipes (the first argument; toy if left out):\n\n{listed}"
            f"\n\nThe defaults below are those of {name}."
        ),
    )
