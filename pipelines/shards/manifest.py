"""What a folder of shards holds, in one file; the shards themselves say the same."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import av
from pydantic import TypeAdapter, ValidationError

from pipelines.shards.attempts import ENDING
from pipelines.shards.layout import FOLDER, Contents, VideoEntry
from pipelines.shards.reading import Shard
from pipelines.shards.settings import FORMAT, ShardError
from pipelines.storage import PARTIAL, file_sizes, join, read_bytes, remove, replacing

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
        ShardError: The manifest is of another form, or damaged.
    """
    if NAME not in file_sizes(folder):
        return None
    content = read_bytes(join(folder, NAME))
    if b'"re2tal shards ' not in content[:200]:
        return None
    try:
        return _MANIFEST.validate_json(content)
    except ValidationError as error:
        raise ShardError(
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
        ShardError: One of them is no shard.
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
