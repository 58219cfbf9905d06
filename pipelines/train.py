"""Train a detector end to end, from video files to segments, and track the run in MLflow.

On the toy data set, in minutes on two CPU cores:

  python pipelines/train.py

Another recipe, on your own data:

  python pipelines/train.py RECIPE --data.annotations A --data.videos FOLDER --model.weights W

A commented recipe for your own data, with the backbone finetuned on its classes first:

  python pipelines/new_recipe.py --annotations A --videos FOLDER > my_recipe.py
  python pipelines/train.py my_recipe.py --finetune-epochs 15

On features (extract_features.py), without videos and backbone:

  python pipelines/train.py RECIPE --data.annotations A --data.features FEATURES

Any field of a recipe is an option by its dotted name; a backbone is chosen by its name:

  python pipelines/train.py toy --epochs 3 --optim.backbone-lr 1e-4
  python pipelines/train.py toy --model.backbone slowfast_toy --model.weights None

Your own recipe, without changes to this repository (pipelines/README.md):

  python pipelines/train.py my_recipe.py

The recipe of an earlier run, such as the best trial of a sweep (sweeps/), with some fields changed:

  python pipelines/train.py --from-run RUN_ID --epochs 12

A layout that fits the GPUs' memory, without changing the recipe's step, frames and pixels; --fit
auto reads the free memory, --fit 24GiB names it (pipelines/README.md describes the choice):

  python pipelines/train.py RECIPE --fit auto
"""

import sys
from collections.abc import Sequence

from pipelines.config.choices import import_own, take
from pipelines.config.command_line import parse_recipe, told_shortly
from pipelines.config.recipe import Recipe
from pipelines.config.recipes import RECIPES
from pipelines.core.storage import absolute as absolute_path
from pipelines.core.tracking import Run, recipe_of, tracking_uri


def parse(arguments: Sequence[str]) -> Recipe:
    """Read the recipe of a run from the command line: a named one, or that of an earlier run.

    Raises:
        UserError: there is no such recipe, backbone or module, or the earlier run's configuration
            cannot be read.
    """
    run_ids, rest = take("--from-run", import_own(arguments))
    recipes = RECIPES
    if run_ids:
        output = absolute_path((take("--output", rest)[0] or ["runs"])[-1])
        earlier = recipe_of(Run(uri=tracking_uri(output), run_id=run_ids[-1]))

        def run() -> Recipe:
            """Configuration of an earlier run."""
            return earlier

        recipes, rest = {"run": run}, ["run", *rest]
    recipe: Recipe = parse_recipe(
        rest, recipes, Recipe, script="train.py", description=__doc__ or ""
    )
    return recipe


if __name__ == "__main__":
    with told_shortly():
        sizes, arguments = take("--fit", sys.argv[1:])
        recipe = parse(arguments)
        # imported here: Ray and MLflow take seconds, and `--help` does not need them
        from pipelines.training.run import train

        train(recipe, fit=sizes[-1] if sizes else None)
