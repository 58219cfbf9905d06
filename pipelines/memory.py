"""Predict the peak memory of a training step, without a GPU and without running it.

Four ways to train the same backbone are compared: plain, with per-block checkpointing, naively
reversible, and reversible as this project does it. Counted is one forward and backward, with
parameters and gradients; with --optimizer also AdamW's moments and the moving average.

A backbone by itself, with adapters too (--tuning adapters or lora):

  python pipelines/memory.py --backbone swin_t --frames 768 --size 224 --fits 24GiB

The detector of a recipe, with overrides of its fields:

  python pipelines/memory.py RECIPE --data.window.frames 512 --fits 24GiB

With a GPU the steps are also run, and predicted stands beside measured. All numbers go to a JSON
file and, with the tables and the picture, to MLflow.
"""

import sys

from pipelines.experiments.profiles import main

if __name__ == "__main__":
    main(sys.argv[1:], description=__doc__ or "")
