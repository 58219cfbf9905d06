r"""Evaluate detections, or a trained detector, against annotations.

A file of detections, as detect.py and training write it (ActivityNet's results JSON); no video is
needed:

  python pipelines/evaluate.py --detections detections.json --annotations A --dataset thumos-14

An ensemble of several runs' detections before non-maximum suppression (--save-raw):

  python pipelines/evaluate.py --detections runs:/RUN/raw_detections.safetensors FILE ... \
      --annotations A

A detector: the folder of a checkpoint, or a run or model in MLflow. It detects in the videos first:

  python pipelines/evaluate.py --model RUN_ID --annotations A --videos FOLDER

(--import MODULE_OR_FILE first imports the module of a backbone or localizer of your own.)

Printed are average precision of every class at every tIoU, average recall by the number of
proposals, Recall@kx for data sets that are compared by it (Ego4D), and a short diagnosis of the
errors. All of it goes to MLflow, and to --output (runs/evaluation): tables as CSV and in
evaluation.json, pictures, and a detector's detections. Detections of the one class "action" are
proposals: --video-scores gives them classes, else they are evaluated without classes.
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
        failure="the detector failed; with less memory it may go through: lower --batch-size.",
    ):
        config = parse(sys.argv[1:])
        # here, because a mistyped option needs neither Ray nor MLflow, which take seconds to import
        from pipelines.inference.evaluation import evaluate_run

        evaluate_run(config)
