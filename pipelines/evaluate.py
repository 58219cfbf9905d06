r"""Evaluate detections, or a trained detector, against annotations.

A file of detections from detect.py or training (ActivityNet's results JSON); it needs no videos:

  python pipelines/evaluate.py --detections detections.json --annotations A --dataset thumos-14

An ensemble of several runs' detections before non-maximum suppression (--save-raw):

  python pipelines/evaluate.py --detections runs:/RUN/raw_detections.safetensors FILE ... \
      --annotations A

A detector, which first detects in the videos: the folder of a checkpoint, or a run or model in
MLflow:

  python pipelines/evaluate.py --model RUN_ID --annotations A --videos FOLDER

(--import MODULE_OR_FILE first imports the module of your own backbone or localizer.)

It prints average precision by class and tIoU, average recall by number of proposals, Recall@kx for
data sets that report it (Ego4D), and a short diagnosis of the errors. All results go to MLflow and
to --output (runs/evaluation): tables as CSV and in evaluation.json, pictures, and a detector's
detections. Detections with the single class "action" are proposals: --video-scores gives them
classes; without it they are evaluated class-agnostically.
"""

import sys
from collections.abc import Sequence

import tyro

from pipelines.config.choices import import_own
from pipelines.config.command_line import told_shortly
from pipelines.inference.options import EvaluateConfig


def parse(arguments: Sequence[str]) -> EvaluateConfig:
    """Read the command line, without the program's name."""
    return tyro.cli(
        EvaluateConfig, args=import_own(arguments), prog="evaluate.py", description=__doc__
    )


if __name__ == "__main__":
    with told_shortly(
        failure="the detector failed. If memory was short, lower --batch-size.",
    ):
        config = parse(sys.argv[1:])
        # imported here: Ray and MLflow take seconds, and a mistyped option should fail at once
        from pipelines.inference.evaluation import evaluate_run

        evaluate_run(config)
