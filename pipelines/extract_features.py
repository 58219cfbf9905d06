r"""Make features of videos with a frozen backbone, to train a localizer on them without frames.

  python pipelines/extract_features.py --videos FOLDER --annotations A --output FEATURES \
      --backbone swin_t --weights torchvision:swin3d_t/KINETICS400_V1
  python pipelines/extract_features.py --way windows --fps 15 --frames 1024 ...

They are made of short clips, one for each feature, like published features (--way clips), or of
long windows, like those of a detector trained end to end (--way windows). features.json beside the
files says where in their videos the features lie.

All places may be URIs (s3://, gs://, ...), and the videos may lie in shards (prepare.py). A run
that was stopped, however hard, goes on when the same command is given again, which also makes the
features anew of videos that were replaced since. Videos that cannot be decoded are listed in
features.json; once they are mended, the same command with --retry-failed makes only theirs.

`python -m re2tal.backbones` lists the backbones; one of your own needs --import MODULE_OR_FILE.
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
        told_shortly(failure="features could not be made. Start again to go on."),
        stoppable(goes_on),
    ):
        config = parse(sys.argv[1:])
        # here, because a mistyped option needs neither Ray nor MLflow, which take seconds to import
        from pipelines.data.feature_extraction import extract_features

        extract_features(config)
