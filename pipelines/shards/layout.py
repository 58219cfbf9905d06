"""How a shard is laid out: the columns of its rows, and what its footer says of all of them."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter

from re2tal.videos.annotations import Instance, VideoAnnotation
from re2tal.videos.transcoding import Piece

FOLDER = "shards"
"""Where the shards lie, in the folder of the manifest."""

FOOTER_KEY = "re2tal"
"""Of the metadata in a shard's footer that hold its `Contents` as JSON."""

_INSTANCES = pa.list_(
    pa.struct([("start", pa.float64()), ("end", pa.float64()), ("label", pa.string())])
)

SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("subset", pa.string()),
        ("piece", pa.int32()),  # from 0 on
        ("pieces", pa.int32()),  # of the video
        ("start", pa.float64()),  # second of the video at which the piece starts
        ("end", pa.float64()),
        ("frames", pa.int32()),  # that come on screen in the piece
        ("duration", pa.float64()),  # seconds of picture of the video, as measured
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps", pa.float64()),  # mean of the video
        ("annotated_duration", pa.float64()),
        ("annotations", _INSTANCES),  # of the whole video, in its seconds
        ("ambiguous", _INSTANCES),
        ("annotations_fingerprint", pa.string()),  # of the whole collection
        ("source", pa.string()),  # path or URI
        ("source_bytes", pa.int64()),
        ("source_codec", pa.string()),
        ("source_width", pa.int32()),  # upright
        ("source_height", pa.int32()),
        ("damage", pa.string()),  # what is wrong with the source there, else empty
        ("video", pa.large_binary()),  # H.264 mp4; empty where the source is damaged
    ]
)
"""A row is a piece of a video, and a row group: one is read without the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoEntry:
    """A video in a shard.

    Attributes:
        first_row: Row of its first piece; the others follow.
        starts: Second at which each piece starts.
        end: Second at which the last one ends.
        damaged: Seconds of those that hold no frames, as the source is damaged there.
        frames: Of all pieces.
        width: Pixels across, upright.
        height: Pixels down.
        source: Width and height, upright, of what it was made from.
        bytes: Of the encoded pieces.
        source_bytes: Of the file that it was made from.
    """

    first_row: int
    starts: tuple[float, ...]
    end: float
    damaged: float
    frames: int
    width: int
    height: int
    source: tuple[int, int]
    bytes: int
    source_bytes: int

    @property
    def duration(self) -> float:
        """Seconds of picture."""
        return self.end - self.starts[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a shard holds, as its footer says.

    Attributes:
        settings: What `ShardSettings.described` returned.
        videos: Video id to where it lies and what it is.
        failures: Video id to why it could not be encoded.
    """

    settings: dict[str, Any]
    videos: dict[str, VideoEntry]
    failures: dict[str, str]


CONTENTS: TypeAdapter[Contents] = TypeAdapter(Contents)


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """The file that a video was made from.

    Attributes:
        uri: Its path or URI.
        bytes: Its size.
        codec: What its pictures were encoded with.
    """

    uri: str
    bytes: int
    codec: str


def row_of(
    video: VideoAnnotation, entry: VideoEntry, number: int, piece: Piece, source: Provenance
) -> dict[str, Any]:
    """A piece as a row of `SCHEMA`, but for the fingerprint.

    Args:
        video: What happens in the video.
        entry: The video as a whole.
        number: Of the piece, from 0 on.
        piece: The piece.
        source: What it was made from.
    """
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
