"""Writing one shard: its videos are encoded one after the other, and a failed one is left out."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

import av
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.core.storage import file_size, open_source, replacing
from pipelines.data.shards import (
    CONTENTS,
    FOOTER_KEY,
    SCHEMA,
    Attempts,
    Contents,
    Provenance,
    Shard,
    ShardSettings,
    VideoEntry,
    row_of,
)
from re2tal.annotations import VideoAnnotation
from re2tal.videos.limits import Limits, VideoError
from re2tal.videos.reader import VideoReader
from re2tal.videos.transcoding import Piece, TranscodeConfig, transcode

_BYTES_IN_MEMORY = 2**26  # more of a video waits on the disk

# Of a piece: Parquet counts the bytes of a page in 31 bits.
_MOST_BYTES = 2**31 - 2**20

# Wall time that a video may take, and for each second of it.
_SECONDS, _SECONDS_PER_SECOND = 600.0, 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedVideo:
    """A video that is encoded whole.

    Attributes:
        entry: What it is; its first row is not known yet.
        source: What it was made from.
    """

    entry: VideoEntry
    source: Provenance
    _pieces: Sequence[Piece]  # without their bytes
    _sizes: Sequence[int]
    _spool: IO[bytes]

    def pieces(self) -> Iterator[Piece]:
        """Its pieces, one after the other, so that only one has to be in memory."""
        self._spool.seek(0)
        for piece, size in zip(self._pieces, self._sizes, strict=True):
            yield replace(piece, video=self._spool.read(size))


@contextmanager
def encoded(uri: str, config: TranscodeConfig, *, seconds: float) -> Iterator[EncodedVideo]:
    """Encodes a video; what is made of it is kept in a temporary file in the meantime.

    Args:
        uri: Path or URI of its file.
        config: How to encode it.
        seconds: About how long it lasts: the time that it may take goes with that.

    Raises:
        VideoError: It cannot be read or encoded.
        OSError: There is no space for temporary files.
    """
    with tempfile.SpooledTemporaryFile(max_size=_BYTES_IN_MEMORY) as spool:
        pieces, sizes = [], []
        codec = ""
        for piece, codec in _transcoded(uri, config, seconds):  # noqa: B007
            spool.write(piece.video)
            pieces.append(replace(piece, video=b""))
            sizes.append(len(piece.video))
        source = Provenance(uri=uri, bytes=file_size(uri), codec=codec)
        entry = VideoEntry(
            first_row=0,
            starts=tuple(piece.start for piece in pieces),
            end=pieces[-1].end,
            damaged=sum(piece.end - piece.start for piece in pieces if piece.damage),
            frames=sum(piece.frames for piece in pieces),
            width=max(piece.width for piece in pieces),  # a damaged piece has none
            height=max(piece.height for piece in pieces),
            source=max(piece.source for piece in pieces),
            bytes=sum(sizes),
            source_bytes=source.bytes,
        )
        yield EncodedVideo(entry=entry, source=source, _pieces=pieces, _sizes=sizes, _spool=spool)


def _transcoded(uri: str, config: TranscodeConfig, seconds: float) -> Iterator[tuple[Piece, str]]:
    """The pieces of a video, each with the codec of its source."""
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
