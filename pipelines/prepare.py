"""Encode videos for random access, and pack them into shards for training.

  python pipelines/prepare.py --annotations A --videos FOLDER --output SHARDS
  python pipelines/train.py RECIPE --data.annotations A --data.videos SHARDS

All paths may be URIs (s3://, gs://, ...). To continue a stopped or killed run, give the same
command again; it also encodes videos that were replaced in the meantime. manifest.json lists
videos that cannot be encoded; once they are repaired, the same command with --retry-failed encodes
only these.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import tyro

from pipelines.config.annotations import AnnotationConfig
from pipelines.config.command_line import told_shortly
from pipelines.core.stopping import goes_on, stoppable
from pipelines.data.inputs import resolved
from pipelines.data.plan import read_annotations
from pipelines.data.shards import SHARDS, Manifest
from re2tal.videos.transcoding import TranscodeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig(AnnotationConfig):
    """Videos to encode, and the settings.

    Attributes:
        videos: folder of the video files, named by id; a path or a URI.
        output: folder for the shards and their manifest; a path or a URI.
        subsets: names of the subsets to encode; all subsets by default.
        transcode: size, frame rate, quality and key frames.
        shard_seconds: approximate seconds of video in a shard; one task makes one shard.
        retry_failed: encode again the videos that failed before; the other videos of their shards
            are copied.
        max_failed: share of failed videos above which the script ends with an error; the other
            videos are kept.
    """

    videos: str | None = None
    output: str | None = None
    subsets: tuple[str, ...] = ()
    transcode: tyro.conf.OmitArgPrefixes[TranscodeConfig] = field(default_factory=TranscodeConfig)
    shard_seconds: float = 900.0
    retry_failed: bool = False
    max_failed: float = 0.05


def parse(arguments: Sequence[str]) -> PrepareConfig:
    """Read the command line, without the program's name."""
    return tyro.cli(PrepareConfig, args=arguments, prog="prepare.py", description=__doc__)


def prepare(config: PrepareConfig) -> Manifest:
    """Make the shards that are missing, and return the manifest of their folder.

    Raises:
        AnnotationError: with every problem in the annotations.
        UserError: if an input is missing; the folder holds shards of other settings, or damaged
            ones; or too many videos failed (the others are in their shards).
    """
    # imported here: Ray takes seconds, and a mistyped option should fail at once
    from pipelines.data.shard_writing import ShardFolder

    config = resolved(config, needed=("annotations", "videos"), written=("output",))
    folder = ShardFolder(
        str(config.output),
        read_annotations(config),
        source=str(config.annotations),
        videos=str(config.videos),
        subsets=config.subsets,
        transcode=config.transcode,
        shard_seconds=config.shard_seconds,
    )
    made = folder.fill(retry_failed=config.retry_failed)
    SHARDS.check_failures(
        made.failures,
        made.totals.failed + made.totals.videos,
        config.max_failed,
        problem="could not be encoded",
    )
    return made


if __name__ == "__main__":
    with (
        told_shortly(failure="a shard could not be written. Start again to continue."),
        stoppable(goes_on),
    ):
        prepare(parse(sys.argv[1:]))
