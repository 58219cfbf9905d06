"""Reading videos from shards, piece by piece.

A video in a shard has a URI of its own: that of the shard, and the video's id as its fragment. So
wherever the URI of a video's file is expected, one in a shard can stand.
"""

from functools import lru_cache
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shards.layout import CONTENTS, FOOTER_KEY
from pipelines.shards.settings import FORMAT, ShardError
from pipelines.storage import open_source, resolve
from re2tal.videos.errors import FrameError, VideoError
from re2tal.videos.pieces import Pieces

_MARK = ".parquet#"

# Shards that a process keeps open: of each the footer, some hundred KB, and nothing of the videos.
_OPEN = 16


class Shard:
    """An open shard.

    Attributes:
        contents: What it holds.

    Args:
        uri: Path or URI of it.

    Raises:
        ShardError: It is no shard, or is damaged.
        OSError: It cannot be reached.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        filesystem, path = resolve(uri)
        try:
            self._parquet = pq.ParquetFile(filesystem.open_input_file(path))
            metadata = self._parquet.metadata.metadata or {}
            self.contents = CONTENTS.validate_json(metadata[FOOTER_KEY.encode()])
        except (pa.ArrowInvalid, KeyError, ValueError) as error:
            raise ShardError(
                f"{uri} is no shard of the form {FORMAT!r}, or is damaged ({error}). Remove it, "
                "and run prepare.py again."
            ) from error

    def row(self, number: int) -> pa.Table:
        """A row with all of its columns."""
        return self._parquet.read_row_group(number, use_threads=False)

    def piece(self, number: int) -> bytes:
        """The video in a row; nothing else is read.

        Raises:
            FrameError: The file that the video was made from is damaged there.
            VideoError: The shard is.
        """
        columns = ["damage", "video"]
        try:
            table = self._parquet.read_row_group(number, columns=columns, use_threads=False)
        except pa.ArrowInvalid as error:
            raise VideoError(self._uri, f"row {number} cannot be read: {error}") from error
        if damage := table["damage"][0].as_py():
            raise FrameError(self._uri, f"its source is damaged there: {damage}")
        content: bytes = table["video"][0].as_py()
        return content

    def pieces(self, video_id: str) -> Pieces:
        """A video, of which only those pieces are read that are needed.

        Raises:
            VideoError: It is not in this shard.
        """
        entry = self.contents.videos.get(video_id)
        name = video_uri(self._uri, video_id)
        if entry is None:
            reason = self.contents.failures.get(video_id, "the shard does not hold it")
            raise VideoError(name, reason)
        first = entry.first_row
        return Pieces(
            name=name,
            starts=entry.starts,
            read=lambda number: self.piece(first + number),
            like=entry.source,
        )


def video_uri(shard: str, video_id: str) -> str:
    """The URI of a video in a shard.

    Args:
        shard: Path or URI of the shard.
        video_id: The video.
    """
    return f"{shard}#{video_id}"


def open_video(uri: str) -> str | BinaryIO | Pieces:
    """Returns what `window_frames` takes: a video in a file as `open_source` does, or its pieces.

    Args:
        uri: Path or URI of a file, or what `video_uri` returned.

    Raises:
        VideoError: The shard cannot be read.
        OSError: It cannot be reached.
    """
    if _MARK not in uri:
        return open_source(uri)
    folder, _, video_id = uri.partition(_MARK)
    try:
        return _opened(folder + _MARK[:-1]).pieces(video_id)
    except ShardError as error:
        raise VideoError(uri, str(error)) from error


@lru_cache(maxsize=_OPEN)
def _opened(uri: str) -> Shard:
    """A shard; a process opens it once for many windows."""
    return Shard(uri)
