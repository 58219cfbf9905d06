"""Detect actions in videos: tables, subtitles, pictures, and a page that plays the detections.

  python pipelines/detect.py --videos video.mp4 --model CHECKPOINT --output found
  python pipelines/detect.py --videos FOLDER "more/*.mkv" s3://bucket/videos --model RUN_ID

Then open found/index.html. The model is the folder of a saved detector or of a training run's
checkpoint, a training run's id in MLflow, or runs:/RUN/detector or models:/NAME/VERSION there.

A run that was stopped goes on when the same command is given again: videos that are done are
kept, those that failed or were replaced are tried once more. Another --score-threshold or other
--formats detect nothing anew.

A detector with a backbone or localizer of your own needs its module: --import MODULE_OR_FILE.
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
        "the detector failed; with less memory it may go through: lower --batch-size. "
        "Start again to go on."
    )
    with told_shortly(failure=failure), stoppable(goes_on):
        config = parse(sys.argv[1:])
        # here, because a mistyped option needs neither Ray nor MLflow, which take seconds to import
        from pipelines.inference.run import run

        run(config)
