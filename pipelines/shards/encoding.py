"""A video encoded whole before any of it is written: its last piece may fail."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO

import av

from pipelines.shards.layout import Provenance, VideoEntry
from pipelines.storage import file_size, open_source
from re2tal.videos.errors import VideoError
from re2tal.videos.limits import Limits
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
