"""Write a commented recipe for your own data set and this machine.

  python pipelines/new_recipe.py --annotations A --videos FOLDER > my_recipe.py
  python pipelines/train.py my_recipe.py

For a GPU of another machine:

  python pipelines/new_recipe.py --annotations A --videos FOLDER --memory 24GiB > my_recipe.py

Standard output is the recipe alone, a Python file for `train.py`; warnings go to standard error.
"""

import sys
from collections.abc import Sequence

import tyro

from pipelines.config.command_line import told_shortly
from pipelines.training.advice import advise
from pipelines.training.facts import NewRecipeConfig, look_at, this_machine
from pipelines.training.written_recipe import written
from re2tal.errors import UserError
from re2tal.memory.fit import parse_size


def parse(arguments: Sequence[str]) -> NewRecipeConfig:
    """Read the command line, without the program's name."""
    return tyro.cli(NewRecipeConfig, args=arguments, prog="new_recipe.py", description=__doc__)


def main(arguments: Sequence[str]) -> None:
    """Write the recipe to standard output."""
    config = parse(arguments)
    try:
        memory = None if config.memory is None else parse_size(config.memory)
    except ValueError as problem:
        raise UserError(f"--memory: {problem}") from problem
    facts, machine = look_at(config), this_machine(memory)
    advice = advise(facts, machine)
    for warning in advice.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    sys.stdout.write(written(advice, facts, machine))


if __name__ == "__main__":
    with told_shortly():
        main(sys.argv[1:])
