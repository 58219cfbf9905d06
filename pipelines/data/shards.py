"""Shards: Parquet files of videos that were encoded for random access. Content, and reading.

A video in a shard has a URI of its own: that of the shard, with the video's id as its fragment.
This URI is accepted wherever that of a video file is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from typing import Any, BinaryIO, Literal

import av
import pyarrow as pa
from pydantic import TypeAdapter

from pipelines.core.storage import Stamp, file_sizes, open_source
from pipelines.data.store import Contents, Store, part
from re2tal.annotations import VideoAnnotation
from re2tal.errors import UserError, count_of, shortened
from re2tal.videos.limits import FrameError, VideoError
from re2tal.videos.pieces import Pieces
from re2tal.videos.transcoding import TranscodeConfig

FORMAT = "re2tal shards 1"
NAME = "manifest.json"
FOLDER = "shards"
"""Folder of the shards, in the folder of the manifest."""

_INSTANCES = pa.list_(
    pa.struct([("start", pa.float64()), ("end", pa.float64()), ("label", pa.string())])
)

SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("subset", pa.string()),
        ("piece", pa.int32()),  # counted from 0
        ("pieces", pa.int32()),  # number of pieces of the video
        ("start", pa.float64()),  # second of the video at which the piece starts
        ("end", pa.float64()),
        ("frames", pa.int32()),  # number of frames that are displayed within the piece
        ("duration", pa.float64()),  # seconds of picture of the video, as measured
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps", pa.float64()),  # mean over the video
        ("annotated_duration", pa.float64()),
        ("annotations", _INSTANCES),  # of the whole video, in seconds of the video
        ("ambiguous", _INSTANCES),
        ("annotations_fingerprint", pa.string()),  # hash of the whole annotation file
        ("source", pa.string()),  # path or URI
        ("source_bytes", pa.int64()),
        ("source_codec", pa.string()),
        ("source_width", pa.int32()),  # after rotation to upright
        ("source_height", pa.int32()),
        ("damage", pa.string()),  # fault of the source in this piece, else empty
        ("video", pa.large_binary()),  # H.264 mp4; empty where the source is damaged
    ]
)
"""Columns. Each row is one piece of a video and one row group: pieces are read one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoEntry:
    """Place and facts of a video in a shard.

    Attributes:
        first_row: row of the first piece; the others follow.
        starts: second at which each piece starts.
        end: second at which the last piece ends, without the missing end of a truncated file.
        damaged: seconds of the pieces that hold no frames because the source is damaged there.
        frames: number of frames of all pieces.
        width: pixels across, after rotation to upright.
        height: pixels down.
        source: width and height, upright, of the file that the video was encoded from.
        bytes: size of the encoded pieces.
        source_bytes: size of the file that the video was encoded from.
        source_head: digest of the beginning of that file, by which it is recognised; empty in
            shards of an older version.
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
    source_head: str = ""

    @property
    def stamp(self) -> Stamp:
        """Signs by which the video's source file is recognised."""
        return Stamp(bytes=self.source_bytes, head=self.source_head)

    @property
    def duration(self) -> float:
        """Seconds of picture."""
        return self.end - self.starts[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSettings:
    """Settings that determine, together with the videos, the content of shards.

    Attributes:
        fingerprint: hash of the annotations.
        subsets: names of the subsets that are encoded, sorted.
        transcode: encoding of the videos.
        shard_seconds: approximate length of the videos in a shard.
    """

    fingerprint: str
    subsets: tuple[str, ...]
    transcode: TranscodeConfig = field(default_factory=TranscodeConfig)
    shard_seconds: float = 900.0

    def __post_init__(self) -> None:
        if not self.shard_seconds > 0:
            raise ValueError(f"shard_seconds must be positive, not {self.shard_seconds}.")

    def described(self) -> dict[str, Any]:
        """Return the settings in the form that shards and manifest record."""
        flat = {
            "format": FORMAT,
            "annotations": self.fingerprint,
            "subsets": list(self.subsets),
            **asdict(self.transcode),
            "shard_seconds": float(self.shard_seconds),
        }
        # floats, so that 30 and 30.0 compare and print alike
        return {k: float(v) if k in ("fps", "piece_seconds") and v else v for k, v in flat.items()}


def pack(
    videos: Sequence[VideoAnnotation], seconds: float
) -> dict[str, tuple[VideoAnnotation, ...]]:
    """Distribute videos over shards in the order of their ids, up to `seconds` of video in each.

    Returns:
        File name of each shard to its videos; a video longer than `seconds` has its own shard. The
        result depends on ids and durations alone.
    """
    shards: list[list[VideoAnnotation]] = []
    filled = 0.0
    for video in sorted(videos, key=lambda video: video.video_id):
        if not shards or filled + video.duration > seconds:
            shards.append([])
            filled = 0.0
        shards[-1].append(video)
        filled += video.duration
    return {part(number): tuple(held) for number, held in enumerate(shards)}


_MARK = ".parquet#"

# Shards that a process keeps open. Each keeps its footer in memory, some hundred KB, and no videos.
_OPEN = 16


class Shard:
    """Shard opened for reading.

    Raises:
        UserError: if the file is not a shard, or is damaged.
        OSError: if it cannot be reached.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._parquet, self.contents = SHARDS.open(uri)

    def row(self, number: int) -> pa.Table:
        """Read all columns of a row."""
        return self._parquet.read_row_group(number, use_threads=False)

    def piece(self, number: int) -> bytes:
        """Read the encoded piece in a row.

        Raises:
            FrameError: if the video's source file is damaged in this piece.
            VideoError: if the shard is damaged.
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
        """Return a video whose pieces are read only when they are needed.

        Raises:
            VideoError: if the video is not in this shard.
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
            like=entry.source,  # frames get the shape of the source's, scaled
        )


def video_uri(shard: str, video_id: str) -> str:
    """Return the URI of a video in a shard."""
    return f"{shard}#{video_id}"


def open_video(uri: str) -> str | BinaryIO | Pieces:
    """Return a video for `window_frames`: a file from `open_source`, or the pieces in a shard.

    Args:
        uri: path or URI of a file, or of a video in a shard (`video_uri`).

    Raises:
        VideoError: if the shard is damaged.
        OSError: if the shard cannot be reached.
    """
    if _MARK not in uri:
        return open_source(uri)
    # partition, not rpartition: an id may contain the mark too
    folder, _, video_id = uri.partition(_MARK)
    try:
        return _opened(folder + _MARK[:-1]).pieces(video_id)
    except UserError as error:
        raise VideoError(uri, str(error)) from error


@lru_cache(maxsize=_OPEN)
def _opened(uri: str) -> Shard:
    """Open a shard, once in a process for many windows."""
    return Shard(uri)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """Entry of a shard in the manifest; `videos` maps ids to the videos in it."""

    name: str
    bytes: int
    rows: int
    videos: dict[str, VideoEntry]


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over all shards.

    Attributes:
        shards: number of existing shards.
        failed: number of videos that could not be encoded.
        rows: number of pieces of videos.
        seconds: total length of the videos.
        damaged_seconds: length of the parts without frames because the source is damaged.
        bytes: size of the shards.
        source_bytes: size of the files that the videos were encoded from.
    """

    shards: int
    videos: int
    failed: int
    rows: int
    seconds: float
    damaged_seconds: float
    frames: int
    bytes: int
    source_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Content of `manifest.json`.

    Attributes:
        format: format of the shards.
        state: "complete" once every shard exists, whether or not videos in it failed.
        settings: settings of the shards, from `ShardSettings.described`.
        annotations: path or URI of the annotations.
        videos: path or URI of the folder of the videos.
        software: versions of the software that made the newest shard.
        expected_shards: number of shards of the complete folder.
        failures: video id to the reason why it could not be encoded.
        shards: existing shards, sorted by name.
    """

    format: str
    state: Literal["complete", "incomplete"]
    settings: dict[str, Any]
    annotations: str
    videos: str
    software: dict[str, str]
    expected_shards: int
    totals: Totals
    failures: dict[str, str]
    shards: tuple[ShardFile, ...]


SHARDS: Store[VideoEntry, Manifest] = Store(
    format=FORMAT,
    folder=FOLDER,
    name=NAME,
    script="prepare.py",
    contents=TypeAdapter(Contents[VideoEntry]),
    description=TypeAdapter(Manifest),
    advice="Run prepare.py again, which rebuilds it from the shards.",
)


def software() -> dict[str, str]:
    """Return the versions of the software on which the bytes of a shard depend."""
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    return {"re2tal": version("re2tal"), "av": av.__version__, "libavcodec": codec}


def make_manifest(
    settings: dict[str, Any],
    shards: Mapping[str, Contents[VideoEntry]],
    sizes: Mapping[str, int],
    *,
    expected: int,
    annotations: str,
    videos: str,
) -> Manifest:
    """Make the manifest of shards; `shards` and `sizes` map file names to contents and bytes."""
    files = tuple(
        ShardFile(
            name=name,
            bytes=sizes[name],
            rows=sum(len(entry.starts) for entry in held.videos.values()),
            videos=held.videos,
        )
        for name, held in sorted(shards.items())
    )
    entries = [entry for file in files for entry in file.videos.values()]
    failures = {k: v for _, held in sorted(shards.items()) for k, v in held.failures.items()}
    return Manifest(
        format=FORMAT,
        state="complete" if len(shards) == expected else "incomplete",
        settings=settings,
        annotations=annotations,
        videos=videos,
        software=software(),
        expected_shards=expected,
        totals=Totals(
            shards=len(files),
            videos=len(entries),
            failed=len(failures),
            rows=sum(file.rows for file in files),
            seconds=sum(entry.duration for entry in entries),
            damaged_seconds=sum(entry.damaged for entry in entries),
            frames=sum(entry.frames for entry in entries),
            bytes=sum(file.bytes for file in files),
            source_bytes=sum(entry.source_bytes for entry in entries),
        ),
        failures=failures,
        shards=files,
    )


def read_manifest(folder: str) -> Manifest | None:
    """Read the manifest of a folder; None if it has none, or only another program's.

    Raises:
        UserError: if the manifest has another format, or is damaged.
    """
    return SHARDS.read_description(folder, mark=b'"re2tal shards ')


def require_whole(folder: str, manifest: Manifest) -> None:
    """Raise if shards of a folder are missing.

    Raises:
        UserError: with the names of some missing shards.
    """
    if manifest.state != "complete":
        there = f": {manifest.totals.shards} of {manifest.expected_shards} shards are there"
        raise SHARDS.incomplete(folder, there)
    sizes = file_sizes(SHARDS.place(folder))
    wrong = [file.name for file in manifest.shards if sizes.get(file.name) != file.bytes]
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} of {count_of(len(manifest.shards), 'shard')} in {NAME} missing"
            f" or of another size: {', '.join(shortened(wrong, 5))}. Run the same prepare.py"
            " command again: it makes the missing shards and lists all anew."
        )


def remarks_on(
    manifest: Manifest, *, fingerprint: str | None, size: int, fps: float | None
) -> tuple[str, ...]:
    """Return remarks on shards that may not suit their use, one sentence each.

    `fingerprint` is the hash of the annotations in use; `size` and `fps` are as in `find_videos`.
    """
    settings = manifest.settings
    remarks = []
    if manifest.totals.damaged_seconds:
        remarks.append(
            f"{manifest.totals.damaged_seconds:.1f} s of the videos in the shards are damaged in "
            "their source files: windows that reach into them fail"
        )
    if fingerprint is not None and settings["annotations"] != fingerprint:
        remarks.append("the shards were made with other annotations; those given now are used")
    if settings["size"] is not None and settings["size"] < size:
        remarks.append(
            f"the shards' frames have {settings['size']} pixels and are enlarged to {size}: make "
            "them again with a larger --size"
        )
    if settings["fps"] is not None and (fps or 0.0) > settings["fps"]:
        remarks.append(
            f"the shards have {settings['fps']:g} frames per second and {fps:g} are sampled, some "
            "of them twice: make them again with a higher --fps"
        )
    return tuple(remarks)
