"""Command line of a sweep, read before the slow imports of its run."""

import os
import sys
from collections.abc import Sequence

from pipelines.config.command_line import parse_recipe, told_shortly
from pipelines.config.recipe import Recipe
from pipelines.config.recipes import RECIPES
from pipelines.core.stopping import goes_on, stoppable
from sweeps.sweep import Sweep, SweepConfig


def main(sweep: Sweep, description: str) -> None:
    """Run a sweep from the command line, with a description for `--help`."""
    # Ray Tune's own handler would silently end the search as if it were complete
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    with told_shortly(), stoppable(goes_on):
        config = parse(sweep, sys.argv[1:], description)
        # imported here: Ray and MLflow take seconds, and a mistyped name should fail at once
        from sweeps.driver import run_sweep

        run_sweep(sweep, config)


def parse(sweep: Sweep, arguments: Sequence[str], description: str) -> SweepConfig:
    """Read a base recipe's name, and the options of the search around it."""

    def around(recipe: Recipe) -> SweepConfig:
        base = sweep.prepare(recipe)
        return SweepConfig(
            name=f"{sweep.name} of {base.name}",
            trials=sweep.trials,
            epochs=sweep.epochs(base),
            base=base,
        )

    config: SweepConfig = parse_recipe(
        arguments,
        RECIPES,
        Recipe,
        script=f"{sweep.name}.py",
        description=description,
        finish=around,
        prefix="--base.",
    )
    return config
