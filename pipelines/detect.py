"""Detect actions in videos: tables, subtitles, pictures, and a page that plays the detections.

  python pipelines/detect.py --videos video.mp4 --model CHECKPOINT --output found
  python pipelines/detect.py --videos FOLDER "more/*.mkv" s3://bucket/videos --model RUN_ID

Then open found/index.html. The model is the folder of a saved detector or of a training run's
checkpoint; or, in MLflow, the id of a training run, runs:/RUN/detector or models:/NAME/VERSION.

To continue a stopped run, give the same command again: finished videos are kept; videos that
failed or were replaced are tried again. A new --score-threshold or other --formats need no new
detection.

A detector with your own backbone or localizer needs its module: --import MODULE_OR_FILE.
"""

import sys
from collections.abc import Sequence

import tyro

from pipelines.config.choices import import_own
from pipelines.config.command_line import told_shortly
from pipelines.core.stopping import goes_on, stoppable
from pipelines.inference.options import DetectConfig


def parse(arguments: Sequence[str]) -> DetectConfig:
    """Read the command line, without the program's name."""
    return tyro.cli(DetectConfig, args=import_own(arguments), prog="detect.py", description=__doc__)


if __name__ == "__main__":
    failure = (
        "the detector failed. If memory was short, lower --batch-size. Start again to continue."
    )
    with told_shortly(failure=failure), stoppable(goes_on):
        config = parse(sys.argv[1:])
        # imported here: Ray and MLflow take seconds, and a mistyped option should fail at once
        from pipelines.inference.run import run

        run(config)
