"""Encodes videos anew for random access and packs them into shards, from which training reads.

  python pipelines/prepare.py --annotations A --videos FOLDER --output SHARDS
  python pipelines/train.py RECIPE --data.annotations A --data.videos SHARDS

All of them may be URIs (s3://, gs://, ...). A run that was stopped, however hard, goes on when the
same command is given again. Videos that cannot be encoded are listed in manifest.json; once they
are mended, the same command with --retry-failed encodes only them.
"""

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.data
import tyro

from pipelines.config.annotations import AnnotationConfig
from pipelines.config.command_line import told_shortly
from pipelines.core.clock import duration
from pipelines.core.cluster import init_ray
from pipelines.core.progress import ShardProgress
from pipelines.core.storage import absolute, file_sizes, join, list_files, require
from pipelines.data.plan import read_annotations
from pipelines.data.shard_writing import ShardTask, write_shard
from pipelines.data.shards import (
    FOLDER,
    NAME,
    Manifest,
    ShardSettings,
    make_manifest,
    pack,
    read_shards,
    remove_leftovers,
    require_equal,
    write_manifest,
)
from re2tal.annotations import Annotations, VideoAnnotation
from re2tal.errors import UserError, shortened
from re2tal.videos.files import match_videos
from re2tal.videos.transcoding import TranscodeConfig

_MANIFEST_SECONDS = 30.0  # from one writing of the manifest to the next: it may have megabytes


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig(AnnotationConfig):
    """What to encode, and how.

    Attributes:
        videos: folder of the video files, named by id; a path or a URI.
        output: folder for the shards and their manifest; a path or a URI.
        subsets: names of the subsets to encode; all of them by default.
        transcode: size, frame rate, quality and key frames.
        shard_seconds: about so many seconds of video lie in a shard; one task makes it.
        retry_failed: also encode the videos that failed before once more, and no others of their
            shards.
        max_failed: end with an error when more than this share of the videos failed; what could be
            encoded is kept.
    """

    videos: str | None = None
    output: str | None = None
    subsets: tuple[str, ...] = ()
    transcode: tyro.conf.OmitArgPrefixes[TranscodeConfig] = field(default_factory=TranscodeConfig)
    shard_seconds: float = 900.0
    retry_failed: bool = False
    max_failed: float = 0.05


def parse(arguments: Sequence[str]) -> PrepareConfig:
    """Reads the command line.

    Args:
        arguments: without the program's name.
    """
    return tyro.cli(PrepareConfig, args=arguments, prog="prepare.py", description=__doc__)


def prepare(config: PrepareConfig) -> Manifest:
    """Makes the shards that are not there yet.

    Args:
        config: what to encode, and how.

    Returns:
        What the folder holds.

    Raises:
        UserError: if something is not there.
        AnnotationError: with every problem in the annotations.
        UserError: if the folder holds shards of other settings, or damaged ones; if more videos
            failed than may; all others are in their shards.
    """
    annotations = read_annotations(config, prefix="--")
    require(config.videos, what="The videos", option="--videos")
    if config.output is None:
        raise UserError("The shards: no path given. Say where with --output PATH_OR_URI.")
    job = _Job(config, absolute(config.output), annotations)
    job.run()
    _check_failures(job.manifest, config.max_failed)
    return job.manifest


class _Job:
    """One run: what is there, what is to be made, and the manifest of it."""

    def __init__(self, config: PrepareConfig, folder: str, annotations: Annotations) -> None:
        self._config, self._folder = config, folder
        videos = _chosen(annotations, config.subsets)
        self._settings = ShardSettings(
            fingerprint=annotations.fingerprint,
            subsets=tuple(sorted({video.subset for video in videos})),
            transcode=config.transcode,
            shard_seconds=config.shard_seconds,
        )
        self._packed = pack(videos, config.shard_seconds)
        self._there = read_shards(folder)
        for contents in self._there.values():
            require_equal(self._settings.described(), contents.settings, folder)

    @property
    def manifest(self) -> Manifest:
        """What is there."""
        return make_manifest(
            self._settings.described(),
            self._there,
            file_sizes(join(self._folder, FOLDER)),
            expected=len(self._packed),
            annotations=absolute(str(self._config.annotations)),
            videos=absolute(str(self._config.videos)),
        )

    def run(self) -> None:
        """Makes what is missing."""
        began = time.perf_counter()
        tasks = self._tasks()
        print(
            f"{len(self._there)} of {len(self._packed)} shards are there; {len(tasks)} to make",
            flush=True,
        )
        remove_leftovers(self._folder)
        write_manifest(self._folder, self.manifest)
        if tasks:
            init_ray()
            self._write(tasks)
            write_manifest(self._folder, self.manifest)
        print(_summary(self.manifest, self._folder, time.perf_counter() - began), flush=True)

    def _tasks(self) -> list[ShardTask]:
        """What to do, shard by shard."""
        wanted = {
            name: videos
            for name, videos in self._packed.items()
            if name not in self._there or (self._config.retry_failed and self._there[name].failures)
        }
        ids = [video.video_id for videos in wanted.values() for video in videos]
        sources, missing = match_videos(ids, list_files(absolute(str(self._config.videos))))
        return [
            ShardTask(
                uri=join(join(self._folder, FOLDER), name),
                settings=self._settings,
                videos=videos,
                sources=_of(videos, sources),
                missing=_of(videos, missing),
                kept=name in self._there,
            )
            for name, videos in wanted.items()
        ]

    def _write(self, tasks: Sequence[ShardTask]) -> None:
        """Makes shards in parallel, and keeps the manifest up to date."""
        coming = [v for task in tasks for v in task.videos if self._is_to_be_encoded(task, v)]
        with ShardProgress(
            shards=len(tasks), videos=len(coming), seconds=sum(v.duration for v in coming)
        ) as progress:
            rows = ray.data.from_items(
                [{"task": task} for task in tasks], override_num_blocks=len(tasks)
            ).map(functools.partial(_run_task, board=progress.board), num_cpus=1)
            written = time.perf_counter()
            for row in rows.iter_rows():
                self._there[row["name"]] = row["contents"]
                progress.shard_done()
                if time.perf_counter() - written > _MANIFEST_SECONDS:
                    write_manifest(self._folder, self.manifest)
                    written = time.perf_counter()

    def _is_to_be_encoded(self, task: ShardTask, video: VideoAnnotation) -> bool:
        name = task.uri.rpartition("/")[2]
        return not task.kept or video.video_id not in self._there[name].videos


def _run_task(row: dict[str, Any], *, board: Any) -> dict[str, Any]:
    """What Ray runs: `task`, a `ShardTask`, to `name` and `contents` of the shard."""
    task: ShardTask = row["task"]
    return {"name": task.uri.rpartition("/")[2], "contents": write_shard(task, board=board)}


def _chosen(annotations: Annotations, subsets: Sequence[str]) -> tuple[VideoAnnotation, ...]:
    """The videos of some subsets, or of all."""
    if not subsets:
        return annotations.videos
    return tuple(video for name in subsets for video in annotations.subset(name).videos)


def _of(videos: Sequence[VideoAnnotation], values: Mapping[str, str]) -> dict[str, str]:
    return {v.video_id: values[v.video_id] for v in videos if v.video_id in values}


def _summary(manifest: Manifest, folder: str, seconds: float) -> str:
    totals = manifest.totals
    made = f"{totals.shards} shards, {totals.videos} videos, {totals.rows} pieces"
    share = totals.bytes / max(1, totals.source_bytes)
    raw = f"{share:.0%} of the {totals.source_bytes / 1e6:.1f} MB of the files"
    took = f"{duration(totals.seconds)} of video; {duration(seconds)} in all"
    lines = [
        f"{manifest.state}: {made}, {took}",
        f"{totals.bytes / 1e6:.1f} MB, {raw}",
    ]
    if totals.damaged_seconds:
        lines.append(f"{totals.damaged_seconds:.1f} s are left out: the files are damaged there")
    if totals.failed:
        lines.append(f"{totals.failed} videos failed: {join(folder, NAME)} says why")
    return "\n".join([*lines, f"train on them with --data.videos {folder}"])


def _check_failures(manifest: Manifest, max_failed: float) -> None:
    failed, total = manifest.totals.failed, manifest.totals.failed + manifest.totals.videos
    if failed <= max_failed * total:
        return
    reasons = [f"{video_id}: {reason}" for video_id, reason in sorted(manifest.failures.items())]
    listed = "\n".join(f"  {line}" for line in shortened(reasons, rest=f", in {NAME}"))
    raise UserError(
        f"{failed} of {total} videos could not be encoded, more than the allowed "
        f"{max_failed:.0%} (--max-failed). Mend them and give the same command with "
        f"--retry-failed.\n{listed}"
    )


if __name__ == "__main__":
    with told_shortly(
        failure="a shard could not be written. Start again to go on.",
    ):
        prepare(parse(sys.argv[1:]))
