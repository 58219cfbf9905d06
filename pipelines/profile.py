"""Predicts the peak memory of a training step, without a GPU and without running it.

Four ways to train the same backbone are compared: plain, with per-block checkpointing, naively
reversible, and reversible as this project does it. Counted is one forward and backward, with
parameters and gradients, without the optimizer.

A backbone by itself:

  python pipelines/profile.py --backbone swin_t --frames 768 --size 224 --fits 24GiB

The detector of a recipe, with overrides of its fields:

  python pipelines/profile.py RECIPE --data.window.frames 512 --fits 24GiB

With a GPU the steps are also run, and predicted stands beside measured. All numbers go to a JSON
file and, with the tables and the picture, to MLflow.
"""

import sys

if __name__ == "profile":
    # Python's own module of this name was meant, and this folder came first on the path.
    from pipelines.planner.standard_library import standard_library_profile

    sys.modules[__name__] = standard_library_profile()
elif __name__ == "__main__":
    from pipelines.planner.command import main

    main(sys.argv[1:], description=__doc__)
