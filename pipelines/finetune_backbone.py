"""Finetune a rewired backbone on trimmed videos (step 4 of Re2TAL), and write its weights.

Or on the annotated segments of untrimmed videos, without cutting them or writing lists:

  python pipelines/finetune_backbone.py RECIPE --data.annotations A --data.videos FOLDER

Toy clips, from the weights that the repository ships, minutes on two CPU cores:

  python pipelines/finetune_backbone.py

Kinetics, from pretrained weights:

  python pipelines/finetune_backbone.py kinetics_re2_swin_t --data.training train.csv
  --data.validation validate.csv --data.videos FOLDER
  --model.weights torchvision:swin3d_t/KINETICS400_V1

Slowly instead of at once (Dr2Net), and plain pretraining from random weights:

  python pipelines/finetune_backbone.py --model.coupling-epochs 1.5
  python pipelines/finetune_backbone.py --model.no-reversible --model.weights None

train.py takes the result as --model.weights: the file, or its URI in MLflow; both are printed.
"""

import sys

from pipelines.config.clip_recipes import RECIPES
from pipelines.config.command_line import parse_recipe, told_shortly
from pipelines.config.recipe import ClassificationRecipe


def parse(arguments: list[str]) -> ClassificationRecipe:
    """Read the recipe of a run from the command line, without the program's name."""
    recipe: ClassificationRecipe = parse_recipe(
        arguments,
        RECIPES,
        ClassificationRecipe,
        script="finetune_backbone.py",
        description=__doc__ or "",
    )
    return recipe


if __name__ == "__main__":
    with told_shortly():
        recipe = parse(sys.argv[1:])
        # here, because `--help` needs neither Ray nor MLflow, which take seconds to import
        from pipelines.training.run import finetune

        finetune(recipe)
