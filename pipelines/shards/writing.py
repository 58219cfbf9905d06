"""Writing one shard: its videos are encoded one after the other, and a failed one is left out."""

from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shards.attempts import Attempts
from pipelines.shards.encoding import EncodedVideo, encoded
from pipelines.shards.layout import CONTENTS, FOOTER_KEY, SCHEMA, Contents, VideoEntry, row_of
from pipelines.shards.reading import Shard
from pipelines.shards.settings import ShardSettings
from pipelines.storage import replacing
from re2tal.videos.annotations import VideoAnnotation
from re2tal.videos.errors import VideoError


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """A shard that is to be written.

    Attributes:
        uri: Path or URI of it.
        settings: What it is made with.
        videos: All that belong into it, sorted by id.
        sources: Video id to path or URI of its file.
        missing: Video id to why it has none.
        kept: Take the videos that the shard holds already as they are, and encode the others only.
    """

    uri: str
    settings: ShardSettings
    videos: tuple[VideoAnnotation, ...]
    sources: dict[str, str]
    missing: dict[str, str]
    kept: bool = False


def write_shard(task: ShardTask, *, board: Any = None) -> Contents:
    """Writes a shard, which gets its name once it is whole.

    The same task gives the same bytes, whatever was there before.

    Args:
        task: What to write.
        board: Actor that is told of each video that is done (`shards.progress`).

    Returns:
        What it holds.

    Raises:
        OSError: The shard cannot be written. What is wrong with a video is a failure of that video.
    """
    attempts = Attempts(task.uri)
    old = Shard(task.uri) if task.kept else None
    with replacing(task.uri) as stream, _Writer(stream, task.settings) as writer:
        for video in task.videos:
            if old is not None and video.video_id in old.contents.videos:
                writer.copy(old, video.video_id)
                continue
            reason = task.missing.get(video.video_id, "")
            if not reason:
                attempts.begin(video.video_id)
                reason = attempts.reason(video.video_id) or _write_video(writer, task, video)
                attempts.end(video.video_id)
            if reason:
                writer.contents.failures[video.video_id] = reason
            if board is not None:
                board.done.remote(video.video_id, video.duration, reason)
    attempts.clear()
    return writer.contents


class _Writer:
    """A shard that is being written, video by video."""

    def __init__(self, stream: Any, settings: ShardSettings) -> None:
        # the videos are compressed already, and there is nothing to know of their bytes
        self._parquet = pq.ParquetWriter(
            stream, SCHEMA, compression="none", use_dictionary=False, write_statistics=False
        )
        self._fingerprint = settings.fingerprint
        self._rows = 0
        self.contents = Contents(settings=settings.described(), videos={}, failures={})

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            footer = CONTENTS.dump_json(self.contents).decode()
            self._parquet.add_key_value_metadata({FOOTER_KEY: footer})
        self._parquet.close()

    def add(self, video: VideoAnnotation, made: EncodedVideo) -> None:
        """Writes a video that was encoded."""
        self._enter(video.video_id, made.entry)
        for number, piece in enumerate(made.pieces()):
            row = row_of(video, made.entry, number, piece, made.source)
            row["annotations_fingerprint"] = self._fingerprint
            self._write(pa.Table.from_pylist([row], schema=SCHEMA))

    def copy(self, old: Shard, video_id: str) -> None:
        """Takes a video from another shard."""
        entry = old.contents.videos[video_id]
        self._enter(video_id, entry)
        for number in range(len(entry.starts)):
            self._write(old.row(entry.first_row + number))

    def _enter(self, video_id: str, entry: VideoEntry) -> None:
        self.contents.videos[video_id] = replace(entry, first_row=self._rows)

    def _write(self, table: pa.Table) -> None:
        self._parquet.write_table(table)
        self._rows += 1


def _write_video(writer: _Writer, task: ShardTask, video: VideoAnnotation) -> str:
    """Encodes a video and writes it; returns why if that is not possible."""
    uri = task.sources[video.video_id]
    try:
        with encoded(uri, task.settings.transcode, seconds=video.duration) as made:
            writer.add(video, made)
    except VideoError as error:
        return error.reason
    return ""
