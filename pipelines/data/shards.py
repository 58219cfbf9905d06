"""Reading videos from shards, piece by piece.

A video in a shard has a URI of its own: that of the shard, and the video's id as its fragment. So
wherever the URI of a video's file is expected, one in a shard can stand.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from typing import Any, BinaryIO, Literal

import av
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from pipelines.core.storage import (
    PARTIAL,
    file_sizes,
    join,
    open_source,
    read_bytes,
    remove,
    replacing,
    resolve,
)
from re2tal.annotations import Instance, VideoAnnotation
from re2tal.errors import UserError
from re2tal.videos.limits import FrameError, VideoError
from re2tal.videos.pieces import Pieces
from re2tal.videos.transcoding import Piece, TranscodeConfig

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


FORMAT = "re2tal shards 1"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSettings:
    """What decides, with the videos, what shards hold.

    Attributes:
        fingerprint: Of the annotations.
        subsets: Names of the subsets that are encoded, sorted.
        transcode: How the videos are encoded.
        shard_seconds: About so many seconds of video lie in a shard.
    """

    fingerprint: str
    subsets: tuple[str, ...]
    transcode: TranscodeConfig = field(default_factory=TranscodeConfig)
    shard_seconds: float = 900.0

    def __post_init__(self) -> None:
        if not self.shard_seconds > 0:
            raise ValueError(f"shard_seconds must be positive, not {self.shard_seconds}.")

    def described(self) -> dict[str, Any]:
        """The settings as they stand in shards and manifest."""
        flat = {
            "format": FORMAT,
            "annotations": self.fingerprint,
            "subsets": list(self.subsets),
            **asdict(self.transcode),
            "shard_seconds": float(self.shard_seconds),
        }
        return {k: float(v) if k in ("fps", "piece_seconds") and v else v for k, v in flat.items()}


def require_equal(wanted: dict[str, Any], there: dict[str, Any], folder: str) -> None:
    """Checks that shards were made with the settings that are asked for.

    Args:
        wanted: What `ShardSettings.described` returns.
        there: The same, from a shard.
        folder: Of the shards, for the message.

    Raises:
        UserError: It says what differs.
    """
    names = [name for name in {**wanted, **there} if wanted.get(name) != there.get(name)]
    if names:
        listed = "; ".join(
            f"{name}: {there.get(name)} there, {wanted.get(name)} asked for" for name in names
        )
        raise UserError(
            f"{folder} holds shards of other settings ({listed}). Give the same settings to go on "
            "with them, or another --output."
        )


def pack(
    videos: Sequence[VideoAnnotation], seconds: float
) -> dict[str, tuple[VideoAnnotation, ...]]:
    """Puts videos into shards: in the order of their ids, about as many seconds into each.

    Args:
        videos: All of them.
        seconds: In a shard; a longer video has one for itself.

    Returns:
        File name of each shard to its videos. It depends on nothing else.
    """
    shards: list[list[VideoAnnotation]] = []
    filled = 0.0
    for video in sorted(videos, key=lambda video: video.video_id):
        if not shards or filled + video.duration > seconds:
            shards.append([])
            filled = 0.0
        shards[-1].append(video)
        filled += video.duration
    return {f"part-{number:05d}.parquet": tuple(held) for number, held in enumerate(shards)}


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
        UserError: It is no shard, or is damaged.
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
            raise UserError(
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
    except UserError as error:
        raise VideoError(uri, str(error)) from error


@lru_cache(maxsize=_OPEN)
def _opened(uri: str) -> Shard:
    """A shard; a process opens it once for many windows."""
    return Shard(uri)


ENDING = ".attempts"
"""Of the names of the files in which attempts are noted, beside the shards."""

_MOST = 2


class Attempts:
    """Notes which video of a shard is being encoded, for the process that comes after a crash.

    Ray starts a task again whose process died. Without a note it would die of the same video again,
    for ever.

    Args:
        shard: Path or URI of the shard.
    """

    def __init__(self, shard: str) -> None:
        folder, _, name = shard.rpartition("/")
        self._uri = join(folder, name + ENDING)
        self._counts: dict[str, int] = {}
        self._noted = name + ENDING in file_sizes(folder)
        if self._noted:
            self._counts = json.loads(read_bytes(self._uri))

    def begin(self, video_id: str) -> None:
        """Notes that a video is begun."""
        self._counts[video_id] = self._counts.get(video_id, 0) + 1
        with replacing(self._uri) as stream:
            stream.write(json.dumps(self._counts).encode())
        self._noted = True

    def reason(self, video_id: str) -> str:
        """Why a video must not be tried again; empty if it may be."""
        if self._counts.get(video_id, 0) <= _MOST:
            return ""
        return f"ended the process that read it, {_MOST} times: a crash, or too little memory"

    def end(self, video_id: str) -> None:
        """Forgets a video that is through."""
        del self._counts[video_id]

    def clear(self) -> None:
        """Removes the note: the shard is whole."""
        if self._noted:
            remove(self._uri)


NAME = "manifest.json"

_READERS = 16  # footers are waited for more than they are read


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """A shard.

    Attributes:
        name: Of the file.
        bytes: Its size.
        rows: Number of its rows.
        videos: Video id to where it lies in the shard and what it is.
    """

    name: str
    bytes: int
    rows: int
    videos: dict[str, VideoEntry]


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over all shards.

    Attributes:
        shards: That are there.
        videos: In them.
        failed: Videos that could not be encoded.
        rows: Pieces of videos.
        seconds: Of video.
        damaged_seconds: Of these, without frames, because the source is damaged.
        frames: In the pieces.
        bytes: Of the shards.
        source_bytes: Of the files that their videos were made from.
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
    """What a folder of shards holds.

    Attributes:
        format: Of the shards.
        state: "complete" once every shard is there, whether or not videos in it failed.
        settings: What `ShardSettings.described` returned.
        annotations: Where they were.
        videos: Where the files of the videos were.
        software: Versions of what made the newest shard.
        expected_shards: How many there are when all are done.
        totals: Sums.
        failures: Video id to why it could not be encoded.
        shards: Those that are there, sorted by name.
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


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def software() -> dict[str, str]:
    """Versions of what decides the bytes of a shard."""
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    return {"re2tal": version("re2tal"), "av": av.__version__, "libavcodec": codec}


def make_manifest(
    settings: dict[str, Any],
    shards: Mapping[str, Contents],
    sizes: Mapping[str, int],
    *,
    expected: int,
    annotations: str,
    videos: str,
) -> Manifest:
    """Sums up shards.

    Args:
        settings: What `ShardSettings.described` returned.
        shards: File name to what is in it, of those that are there.
        sizes: File name to bytes.
        expected: Number of shards when all are there.
        annotations: Where they were.
        videos: Where the files of the videos were.
    """
    files = tuple(
        ShardFile(
            name=name,
            bytes=sizes[name],
            rows=sum(len(entry.starts) for entry in held.videos.values()),
            videos=held.videos,
        )
        for name, held in sorted(shards.items())
    )
    failures = {k: v for _, held in sorted(shards.items()) for k, v in held.failures.items()}
    return Manifest(
        format=FORMAT,
        state="complete" if len(shards) == expected else "incomplete",
        settings=settings,
        annotations=annotations,
        videos=videos,
        software=software(),
        expected_shards=expected,
        totals=_totals(files, failed=len(failures)),
        failures=failures,
        shards=files,
    )


def _totals(files: Iterable[ShardFile], *, failed: int) -> Totals:
    files = list(files)
    entries = [entry for file in files for entry in file.videos.values()]
    return Totals(
        shards=len(files),
        videos=len(entries),
        failed=failed,
        rows=sum(file.rows for file in files),
        seconds=sum(entry.duration for entry in entries),
        damaged_seconds=sum(entry.damaged for entry in entries),
        frames=sum(entry.frames for entry in entries),
        bytes=sum(file.bytes for file in files),
        source_bytes=sum(entry.source_bytes for entry in entries),
    )


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Writes the manifest of a folder, in the place of an older one.

    Args:
        folder: Path or URI of the folder.
        manifest: What it holds.
    """
    with replacing(join(folder, NAME)) as stream:
        stream.write(_MANIFEST.dump_json(manifest, indent=1))


def read_manifest(folder: str) -> Manifest | None:
    """Reads the manifest of a folder, if it is one of shards.

    Args:
        folder: Path or URI of the folder.

    Returns:
        None if it holds no manifest, or another program's.

    Raises:
        UserError: The manifest is of another form, or damaged.
    """
    if NAME not in file_sizes(folder):
        return None
    content = read_bytes(join(folder, NAME))
    if b'"re2tal shards ' not in content[:200]:
        return None
    try:
        return _MANIFEST.validate_json(content)
    except ValidationError as error:
        raise UserError(
            f"{join(folder, NAME)} is not a manifest of the form {FORMAT!r}, or is damaged: "
            f"{error.error_count()} problems, the first: {error.errors()[0]['msg']}. Run "
            "prepare.py again, which makes it anew from the shards."
        ) from error


def read_shards(folder: str) -> dict[str, Contents]:
    """Reads what the shards in a folder hold, from their footers.

    Args:
        folder: Path or URI of the folder of the manifest.

    Returns:
        File name to what is in it, in the order of the names.

    Raises:
        UserError: One of them is no shard.
    """
    shards = join(folder, FOLDER)
    names = [name for name in file_sizes(shards) if name.endswith(".parquet")]
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        held = pool.map(lambda name: Shard(join(shards, name)).contents, names)
        return dict(zip(names, held, strict=True))


def remove_leftovers(folder: str) -> None:
    """Removes what a run left behind that was killed.

    Args:
        folder: Path or URI of the folder of the manifest.
    """
    for place in (folder, join(folder, FOLDER)):
        for name in file_sizes(place):
            if PARTIAL in name or name.endswith(ENDING):
                remove(join(place, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundVideos:
    """Videos that were looked for in shards.

    Attributes:
        uris: Video id to the URI of the video in its shard.
        failures: Video id to why it is not there.
        durations: Video id to seconds of picture.
        remarks: What may surprise, a sentence each.
    """

    uris: dict[str, str]
    failures: dict[str, str]
    durations: dict[str, float]
    remarks: tuple[str, ...]


def find_in_shards(
    folder: str,
    manifest: Manifest,
    video_ids: Iterable[str],
    *,
    fingerprint: str,
    size: int,
    fps: float | None,
) -> FoundVideos:
    """Finds videos in a folder of shards, by its manifest; no shard is opened.

    Args:
        folder: Path or URI of the folder.
        manifest: Of that folder.
        video_ids: The videos.
        fingerprint: Of the annotations that go with them.
        size: Pixels of the short side for which they are wanted.
        fps: Frames per second at which they are wanted; None if that depends on the video.

    Raises:
        UserError: Shards are missing, or not whole.
    """
    _require_whole(folder, manifest)
    held = {
        video_id: (file.name, entry)
        for file in manifest.shards
        for video_id, entry in file.videos.items()
    }
    uris, failures, durations = {}, {}, {}
    for video_id in video_ids:
        if video_id in held:
            name, entry = held[video_id]
            uris[video_id] = video_uri(join(join(folder, FOLDER), name), video_id)
            durations[video_id] = entry.duration
        else:
            failures[video_id] = manifest.failures.get(video_id, f"no shard in {folder} holds it")
    remarks = _remarks(manifest, fingerprint=fingerprint, size=size, fps=fps)
    return FoundVideos(uris=uris, failures=failures, durations=durations, remarks=remarks)


def _require_whole(folder: str, manifest: Manifest) -> None:
    if manifest.state != "complete":
        raise UserError(
            f"{folder} is not complete: {manifest.totals.shards} of {manifest.expected_shards} "
            "shards are there. Give the command with prepare.py that made them again: it goes on."
        )
    sizes = file_sizes(join(folder, FOLDER))
    wrong = [file.name for file in manifest.shards if sizes.get(file.name) != file.bytes]
    if wrong:
        raise UserError(
            f"{len(wrong)} of the {len(manifest.shards)} shards in {folder} are missing, or not "
            f"those that {NAME} lists: {', '.join(wrong[:5])}{', ...' * (len(wrong) > 5)}. Give "
            "the command with prepare.py that made them again: it makes the missing ones."
        )


def _remarks(
    manifest: Manifest, *, fingerprint: str, size: int, fps: float | None
) -> tuple[str, ...]:
    settings = manifest.settings
    remarks = []
    if manifest.totals.damaged_seconds:
        remarks.append(
            f"{manifest.totals.damaged_seconds:.1f} s of the videos in the shards are damaged in "
            "their files: windows that reach into them fail"
        )
    if settings["annotations"] != fingerprint:
        remarks.append("the shards were made with other annotations; those given now are used")
    if settings["size"] is not None and settings["size"] < size:
        remarks.append(
            f"the shards' frames have {settings['size']} pixels and are enlarged to {size}: make "
            "them anew with a larger --size"
        )
    if settings["fps"] is not None and (fps or 0.0) > settings["fps"]:
        remarks.append(
            f"the shards have {settings['fps']:g} frames per second and {fps:g} are sampled, some "
            "of them twice: make them anew with a higher --fps"
        )
    return tuple(remarks)
