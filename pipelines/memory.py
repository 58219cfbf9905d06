"""Predict the peak memory of a training step, without a GPU and without running it.

It compares four ways to train the same backbone: plain, with activation checkpointing of each
block, naively reversible, and reversible as in this project. One forward and backward pass is
counted, with parameters and gradients; with --optimizer also AdamW's moments and the EMA.

A backbone by itself, with adapters too (--tuning adapters or lora):

  python pipelines/memory.py --backbone swin_t --frames 768 --size 224 --longest 24GiB

The detector of a recipe, with overrides of its fields:

  python pipelines/memory.py RECIPE --data.window.frames 512 --longest 24GiB

The layout with which a recipe fits a GPU of a given size, without changing its step, frames or
pixels: batch size, accumulation, size of pieces, and what is stored. Optimizer and EMA are
counted, and train.py takes the same option:

  python pipelines/memory.py RECIPE --fit 24GiB

With a GPU the steps are also run, and the tables show predicted beside measured memory. All numbers
go to a JSON file and, with tables and picture, to MLflow.
"""

import sys

from pipelines.experiments.profiles import main

if __name__ == "__main__":
    main(sys.argv[1:], description=__doc__ or "")
