r"""Make features of videos with a frozen backbone, for training a localizer without frames.

  python pipelines/extract_features.py --videos FOLDER --annotations A --output FEATURES \
      --backbone swin_t --weights torchvision:swin3d_t/KINETICS400_V1
  python pipelines/extract_features.py --way windows --fps 15 --frames 1024 ...

Features come from short clips, one clip a feature, like published features (--way clips), or from
long windows, as in a detector trained end to end (--way windows). features.json beside the files
gives the places of features in their videos.

All paths may be URIs (s3://, gs://, ...), and the videos may lie in shards (prepare.py). To
continue a stopped or killed run, give the same command again; it also remakes the features of
videos that were replaced in the meantime. features.json lists videos that cannot be decoded; once
they are repaired, the same command with --retry-failed makes only their features.

`python -m re2tal.backbones` lists the backbones; your own needs --import MODULE_OR_FILE.
"""

import sys
from collections.abc import Sequence

import tyro

from pipelines.config.choices import import_own
from pipelines.config.command_line import told_shortly
from pipelines.core.stopping import goes_on, stoppable
from pipelines.data.feature_options import ExtractConfig


def parse(arguments: Sequence[str]) -> ExtractConfig:
    """Read the command line, without the program's name."""
    return tyro.cli(
        ExtractConfig, args=import_own(arguments), prog="extract_features.py", description=__doc__
    )


if __name__ == "__main__":
    with (
        told_shortly(failure="features could not be made. Start again to continue."),
        stoppable(goes_on),
    ):
        config = parse(sys.argv[1:])
        # imported here: Ray and MLflow take seconds, and a mistyped option should fail at once
        from pipelines.data.feature_extraction import extract_features

        extract_features(config)
