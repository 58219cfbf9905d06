"""Finetune a rewired backbone on trimmed videos (step 4 of Re2TAL), and write its weights.

On the annotated segments of untrimmed videos, without cutting them or writing lists:

  python pipelines/finetune_backbone.py RECIPE --data.annotations A --data.videos FOLDER

On toy clips, from the weights that the repository ships, in minutes on two CPU cores:

  python pipelines/finetune_backbone.py

On Kinetics, from pretrained weights:

  python pipelines/finetune_backbone.py kinetics_re2_swin_t --data.training train.csv
  --data.validation validate.csv --data.videos FOLDER
  --model.weights torchvision:swin3d_t/KINETICS400_V1

With gradual instead of immediate rewiring (Dr2Net); and plain pretraining from random weights:

  python pipelines/finetune_backbone.py --model.coupling-epochs 1.5
  python pipelines/finetune_backbone.py --model.no-reversible --model.weights None

train.py takes the result as --model.weights: the file, or its URI in MLflow. Both are printed.
"""

import sys

from pipelines.config.clip_recipes import RECIPES, ClassificationRecipe
from pipelines.config.command_line import parse_recipe, told_shortly


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
        # imported here: Ray and MLflow take seconds, and `--help` does not need them
        from pipelines.training.run import finetune

        finetune(recipe)
