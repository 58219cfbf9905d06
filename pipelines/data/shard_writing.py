"""Making of shards: each Ray task encodes the videos of one shard, and leaves out failures."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, Any

import av
import pyarrow as pa
import ray.data

from pipelines.core.clock import duration
from pipelines.core.cluster import start_ray
from pipelines.core.progress import ProgressPrinter, VideoCounter
from pipelines.core.storage import (
    Stamp,
    file_sizes,
    join,
    list_files,
    open_source,
    replaced_files,
    stamps_of,
)
from pipelines.data.shards import (
    NAME,
    SCHEMA,
    SHARDS,
    Manifest,
    Shard,
    ShardSettings,
    VideoEntry,
    make_manifest,
    pack,
)
from pipelines.data.store import Attempts, Contents, FileWriter, Refreshed
from re2tal.annotations import Annotations, Instance, VideoAnnotation
from re2tal.videos.files import match_videos
from re2tal.videos.limits import Limits, VideoError
from re2tal.videos.reader import CUT, VideoReader
from re2tal.videos.transcoding import Piece, TranscodeConfig, transcode

_BYTES_IN_MEMORY = 2**26  # a larger encoded video is kept in a file until it is written

# Limit for a piece: Parquet counts the bytes of a page in 31 bits.
_MOST_BYTES = 2**31 - 2**20

# Wall time that encoding may take: a constant, plus so much per second of video.
_SECONDS, _SECONDS_PER_SECOND = 600.0, 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """File that a video in a shard was encoded from."""

    uri: str
    bytes: int
    codec: str


def _row(
    video: VideoAnnotation, entry: VideoEntry, number: int, piece: Piece, source: Provenance
) -> dict[str, Any]:
    """Return a piece as a row of `SCHEMA`, without the fingerprint."""
    return {
        "video_id": video.video_id,
        "subset": video.subset,
        "piece": number,
        "pieces": len(entry.starts),
        "start": piece.start,
        "end": piece.end,
        "frames": piece.frames,
        "duration": entry.duration,
        "width": piece.width,
        "height": piece.height,
        "fps": entry.frames / entry.duration,
        "annotated_duration": video.duration,
        "annotations": _instances(video.instances),
        "ambiguous": _instances(video.ambiguous),
        "source": source.uri,
        "source_bytes": source.bytes,
        "source_codec": source.codec,
        "source_width": entry.source[0],
        "source_height": entry.source[1],
        "damage": piece.damage,
        "video": piece.video,
    }


def _instances(instances: tuple[Instance, ...]) -> list[dict[str, Any]]:
    return [{"start": i.start, "end": i.end, "label": i.label} for i in instances]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedVideo:
    """Completely encoded video; its first row is not known yet."""

    entry: VideoEntry
    source: Provenance
    _pieces: Sequence[Piece]  # without their bytes
    _sizes: Sequence[int]
    _spool: IO[bytes]

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces one by one, so that only one is in memory."""
        self._spool.seek(0)
        for piece, size in zip(self._pieces, self._sizes, strict=True):
            yield replace(piece, video=self._spool.read(size))


@contextmanager
def encoded(uri: str, config: TranscodeConfig, *, seconds: float) -> Iterator[EncodedVideo]:
    """Encode a video into a temporary file, which is deleted when the block ends.

    `seconds` is the video's approximate length; the time limit of encoding grows with it.

    Raises:
        VideoError: if it cannot be read or encoded.
        OSError: if there is no space for temporary files.
    """
    # before reading: if the file is replaced meanwhile, the next run notices
    stamp = stamps_of({uri: uri}).get(uri, Stamp(bytes=0, head=""))
    with tempfile.SpooledTemporaryFile(max_size=_BYTES_IN_MEMORY) as spool:
        pieces, sizes = [], []
        codec = ""
        for piece, codec in _transcoded(uri, config, seconds):  # noqa: B007
            spool.write(piece.video)
            pieces.append(replace(piece, video=b""))
            sizes.append(len(piece.video))
        source = Provenance(uri=uri, bytes=stamp.bytes, codec=codec)
        entry = VideoEntry(
            first_row=0,
            starts=tuple(piece.start for piece in pieces),
            end=max(piece.end for piece in pieces if piece.damage != CUT),  # without a lost end
            damaged=sum(piece.end - piece.start for piece in pieces if piece.damage),
            frames=sum(piece.frames for piece in pieces),
            width=max(piece.width for piece in pieces),  # 0 in a damaged piece
            height=max(piece.height for piece in pieces),
            source=max(piece.source for piece in pieces),
            bytes=sum(sizes),
            source_bytes=source.bytes,
            source_head=stamp.head,
        )
        yield EncodedVideo(entry=entry, source=source, _pieces=pieces, _sizes=sizes, _spool=spool)


def _transcoded(uri: str, config: TranscodeConfig, seconds: float) -> Iterator[tuple[Piece, str]]:
    """Yield the pieces of a video, each with the codec of its source."""
    limits = Limits(seconds=_SECONDS + _SECONDS_PER_SECOND * seconds)
    try:
        with VideoReader(open_source(uri), limits=limits) as reader:
            for piece in transcode(reader, config):
                if len(piece.video) > _MOST_BYTES:
                    raise VideoError(
                        uri,
                        f"a piece of it takes {len(piece.video)} bytes, too many for a row: cut it "
                        "into shorter ones (--piece-seconds)",
                    )
                yield piece, reader.stream.codec_context.name
    except (OSError, av.FFmpegError) as error:
        raise VideoError(uri, f"cannot be encoded: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """Task of writing one shard.

    Attributes:
        uri: path or URI of the shard.
        settings: settings that the shard is made with.
        videos: all videos of the shard, sorted by id.
        sources: video id to path or URI of its file.
        missing: video id to the reason why it has no file.
        kept: copy the videos that the shard holds already, and encode only the others.
        replaced: ids of videos that are encoded again because their files were replaced.
    """

    uri: str
    settings: ShardSettings
    videos: tuple[VideoAnnotation, ...]
    sources: dict[str, str]
    missing: dict[str, str]
    kept: bool = False
    replaced: frozenset[str] = frozenset()

    def keeps(self, video_id: str, there: Contents[VideoEntry]) -> bool:
        """Tell whether a video is copied from the existing shard, whose contents are `there`."""
        return self.kept and video_id in there.videos and video_id not in self.replaced


def write_shard(task: ShardTask, *, board: Any = None) -> Contents[VideoEntry]:
    """Write a shard; the file gets its name only once it is whole.

    The same task gives the same bytes, whatever was there before. A fault in a video is recorded as
    that video's failure, and is not an error.

    Args:
        task: the shard.
        board: actor to which each finished video is posted: id, seconds, reason of a failure.

    Raises:
        OSError: if the shard cannot be written.
    """
    attempts = Attempts(task.uri)
    old = Shard(task.uri) if task.kept else None
    posted = None
    with SHARDS.writing(task.uri, SCHEMA, task.settings.described()) as writer:
        for video in task.videos:
            if old is not None and task.keeps(video.video_id, old.contents):
                _copy(writer, old, video.video_id)
                continue
            reason = task.missing.get(video.video_id, "")
            if not reason:
                reason = attempts.begin(video.video_id) or _encode(writer, task, video)
                attempts.end(video.video_id)
            if reason:
                writer.contents.failures[video.video_id] = reason
            if board is not None:
                posted = board.post.remote((video.video_id, video.duration, reason))
    attempts.clear()
    if posted is not None:
        ray.get(posted)  # the driver stops listening when the last task has ended
    return writer.contents


def _encode(writer: FileWriter[VideoEntry], task: ShardTask, video: VideoAnnotation) -> str:
    """Encode a video and write it; return the reason of a failure, else an empty string."""
    uri = task.sources[video.video_id]
    try:
        with encoded(uri, task.settings.transcode, seconds=video.duration) as made:
            entry = replace(made.entry, first_row=writer.rows)
            writer.contents.videos[video.video_id] = entry
            for number, piece in enumerate(made.pieces()):
                row = _row(video, entry, number, piece, made.source)
                row["annotations_fingerprint"] = task.settings.fingerprint
                writer.write(pa.Table.from_pylist([row], schema=SCHEMA))
    except VideoError as error:
        return error.reason
    return ""


def _copy(writer: FileWriter[VideoEntry], old: Shard, video_id: str) -> None:
    """Copy a video from another shard."""
    entry = old.contents.videos[video_id]
    writer.contents.videos[video_id] = replace(entry, first_row=writer.rows)
    for number in range(len(entry.starts)):
        writer.write(old.row(entry.first_row + number))


class ShardFolder:
    """Folder that is being filled with shards; a killed run can be continued.

    Args:
        uri: path or URI of the folder.
        annotations: annotations of the videos.
        source: path or URI of the annotations.
        videos: path or URI of the folder of the videos.
        subsets: names of the subsets to encode; empty for all videos.
        transcode: encoding of the videos.
        shard_seconds: see `ShardSettings`.

    Raises:
        UserError: if the folder holds shards of other settings, or damaged ones.
        AnnotationError: if a subset does not exist.
    """

    def __init__(
        self,
        uri: str,
        annotations: Annotations,
        *,
        source: str,
        videos: str,
        subsets: Sequence[str],
        transcode: TranscodeConfig,
        shard_seconds: float,
    ) -> None:
        self._uri, self._source, self._videos = uri, source, videos
        chosen = annotations.chosen(subsets)
        self._settings = ShardSettings(
            fingerprint=annotations.fingerprint,
            subsets=tuple(sorted({video.subset for video in chosen})),
            transcode=transcode,
            shard_seconds=shard_seconds,
        )
        self._packed = pack(chosen, shard_seconds)
        self._there = SHARDS.read(uri, self._settings.described())

    @property
    def manifest(self) -> Manifest:
        """Content of the folder."""
        return make_manifest(
            self._settings.described(),
            self._there,
            file_sizes(SHARDS.place(self._uri)),
            expected=len(self._packed),
            annotations=self._source,
            videos=self._videos,
        )

    def fill(self, *, retry_failed: bool) -> Manifest:
        """Make the shards that are missing.

        With `retry_failed`, videos that failed before are encoded again; the other videos of their
        shards are copied.
        """
        began = time.perf_counter()
        tasks = self._tasks(retry_failed=retry_failed)
        there = f"{len(self._there)} of {len(self._packed)} shards are there"
        print(f"{there}; {len(tasks)} to make", flush=True)
        SHARDS.remove_leftovers(self._uri)
        described = Refreshed(lambda: SHARDS.write_description(self._uri, self.manifest))
        described.refresh(now=True)
        if tasks:
            start_ray()
            self._write(tasks, described)
            described.refresh(now=True)
        manifest = self.manifest
        print(_summary(manifest, self._uri, time.perf_counter() - began), flush=True)
        return manifest

    def _tasks(self, *, retry_failed: bool) -> list[ShardTask]:
        ids = [video.video_id for videos in self._packed.values() for video in videos]
        sources, missing = match_videos(ids, list_files(self._videos))
        stamps = {
            v: entry.stamp for held in self._there.values() for v, entry in held.videos.items()
        }
        replaced = frozenset(replaced_files(sources, stamps))
        for video_id in sorted(replaced):
            print(f"  replaced: {video_id}: its file is not the one that its shard was made of")
        wanted = {
            name: videos
            for name, videos in self._packed.items()
            if name not in self._there
            or (retry_failed and self._there[name].failures)
            or not replaced.isdisjoint(self._there[name].videos)
        }
        return [
            ShardTask(
                uri=join(SHARDS.place(self._uri), name),
                settings=self._settings,
                videos=videos,
                sources=_of(videos, sources),
                missing=_of(videos, missing),
                kept=name in self._there,
                replaced=replaced & {video.video_id for video in videos},
            )
            for name, videos in wanted.items()
        ]

    def _write(self, tasks: Sequence[ShardTask], described: Refreshed) -> None:
        """Write shards in parallel, and keep the manifest up to date."""
        coming = [
            video.duration
            for task in tasks
            for video in task.videos
            if not (task.kept and task.keeps(video.video_id, self._there[_name(task)]))
        ]
        counter = VideoCounter(len(coming), sum(coming))

        def show(posted: tuple[str, float, str]) -> None:
            video_id, seconds, reason = posted
            if reason:
                print(f"  failed: {video_id}: {reason}", flush=True)
            counter.made(seconds)
            counter.through()

        with ProgressPrinter(show) as progress:
            rows = ray.data.from_items(
                [{"task": task} for task in tasks], override_num_blocks=len(tasks)
            ).map(partial(_run_task, board=progress.board), num_cpus=1)
            rows.set_name("writing shards")
            for row in rows.iter_rows():
                self._there[row["name"]] = row["contents"]
                described.refresh()


def _run_task(row: dict[str, Any], *, board: Any) -> dict[str, Any]:
    """Write a shard; Ray calls this."""
    return {"name": _name(row["task"]), "contents": write_shard(row["task"], board=board)}


def _name(task: ShardTask) -> str:
    return task.uri.rpartition("/")[2]


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
