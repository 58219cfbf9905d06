"""Writing and reading files of features; a file gets its name once it is whole."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.features.layout import (
    FILE_CONTENTS,
    FOOTER_KEY,
    FORMAT,
    FeatureError,
    FeatureType,
    FileContents,
    VideoEntry,
    schema,
)
from pipelines.storage import read_bytes, replacing, resolve


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExtractedVideo:
    """A video's features, and what goes into a Parquet file with them.

    Attributes:
        entry: where they lie in the video; its file and row are not known yet.
        subset: of the annotations; empty without.
        source: path or URI of the video.
        features: of shape (T, C), in the type in which they are written.
    """

    entry: VideoEntry
    subset: str
    source: str
    features: np.ndarray


def write_npy(uri: str, features: np.ndarray) -> None:
    """Writes one video's features.

    Args:
        uri: path or URI of the file.
        features: of shape (T, C).
    """
    buffer = io.BytesIO()
    np.save(buffer, features, allow_pickle=False)
    with replacing(uri) as stream:
        stream.write(buffer.getbuffer())


def read_array(uri: str) -> np.ndarray:
    """Reads the array in a `.npy` file, or the one called `feats`, or the only one, in a `.npz`.

    Args:
        uri: path or URI of the file.

    Raises:
        FeatureError: if it holds none of shape (T, C).
        OSError: if it cannot be reached.
    """
    try:
        # nothing in it is unpickled: that could run code
        found = np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            name = "feats" if "feats" in found.files or len(found.files) != 1 else found.files[0]
            found = found[name]
    except (ValueError, EOFError, KeyError) as error:
        raise FeatureError(f"{uri} cannot be read as an array: {error}") from error
    return _checked(uri, found)


def _checked(uri: str, features: np.ndarray) -> np.ndarray:
    if features.ndim != 2 or not features.size or features.dtype.kind != "f":
        raise FeatureError(
            f"{uri} must hold floating numbers of shape (T, C), but holds {features.dtype} of "
            f"shape {features.shape}."
        )
    return features


def write_parquet(
    uri: str,
    videos: Mapping[str, ExtractedVideo],
    *,
    name: str,
    kind: FeatureType,
    settings: dict[str, Any],
    failures: dict[str, str],
) -> FileContents:
    """Writes some videos' features, in the order of their ids.

    Args:
        uri: path or URI of the file.
        videos: video id to its features.
        name: of the file, relative to the folder.
        kind: of the features.
        settings: what decides them.
        failures: video id to why it has none, of the videos that belong into the file.

    Returns:
        What it holds.
    """
    entries: dict[str, VideoEntry] = {}
    columns = schema(kind)
    with (
        replacing(uri) as stream,
        # features have no values that repeat, and compress by a tenth
        pq.ParquetWriter(
            stream, columns, compression="none", use_dictionary=["subset"], write_statistics=False
        ) as writer,
    ):
        for row, (video_id, video) in enumerate(sorted(videos.items())):
            entries[video_id] = _placed(video.entry, name, row)
            writer.write_table(_row(video_id, video, columns))
        contents = FileContents(settings=settings, videos=entries, failures=failures)
        footer = FILE_CONTENTS.dump_json(contents).decode()
        writer.add_key_value_metadata({FOOTER_KEY: footer})
    return contents


def _placed(entry: VideoEntry, name: str, row: int) -> VideoEntry:
    return VideoEntry(
        file=name,
        row=row,
        length=entry.length,
        fps=entry.fps,
        stride=entry.stride,
        offset=entry.offset,
        duration=entry.duration,
    )


def _row(video_id: str, video: ExtractedVideo, columns: pa.Schema) -> pa.Table:
    length, channels = video.features.shape
    values = pa.array(np.ascontiguousarray(video.features).reshape(-1))
    offsets = pa.array([0, len(values)], pa.int64())
    plain = {
        "video_id": video_id,
        "subset": video.subset,
        "length": length,
        "channels": channels,
        "fps": video.entry.fps,
        "stride": video.entry.stride,
        "offset": video.entry.offset,
        "duration": video.entry.duration,
        "source": video.source,
    }
    arrays = [pa.array([plain[f.name]], f.type) for f in columns if f.name != "features"]
    return pa.Table.from_arrays(
        [*arrays, pa.LargeListArray.from_arrays(offsets, values)], schema=columns
    )


def read_contents(uri: str) -> FileContents:
    """Reads what a Parquet file holds, from its footer.

    Args:
        uri: path or URI of the file.

    Raises:
        FeatureError: if it is no file of features.
        OSError: if it cannot be reached.
    """
    with _opened(uri) as parquet:
        try:
            metadata = parquet.metadata.metadata or {}
            return FILE_CONTENTS.validate_json(metadata[FOOTER_KEY.encode()])
        except (KeyError, ValueError) as error:
            raise _unreadable(uri, error) from error


def read_rows(uri: str, rows: Sequence[int]) -> dict[str, ExtractedVideo]:
    """Reads videos from a Parquet file.

    Args:
        uri: path or URI of the file.
        rows: which ones.

    Returns:
        Video id to its features.

    Raises:
        FeatureError: if it is damaged.
        OSError: if it cannot be reached.
    """
    with _opened(uri) as parquet:
        try:
            tables = [parquet.read_row_group(row, use_threads=False) for row in rows]
        except (pa.ArrowInvalid, OSError) as error:
            raise _unreadable(uri, error) from error
    return {table["video_id"][0].as_py(): _video(uri, table) for table in tables}


def _video(uri: str, table: pa.Table) -> ExtractedVideo:
    plain = table.drop_columns(["features"]).to_pylist()[0]
    values = table["features"].combine_chunks().values.to_numpy(zero_copy_only=False)
    length = plain["length"]
    return ExtractedVideo(
        entry=VideoEntry(
            file="",
            length=length,
            fps=plain["fps"],
            stride=plain["stride"],
            offset=plain["offset"],
            duration=plain["duration"],
        ),
        subset=plain["subset"],
        source=plain["source"],
        features=_checked(uri, values.reshape(length, plain["channels"])),
    )


def _opened(uri: str) -> pq.ParquetFile:
    filesystem, path = resolve(uri)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path))
    except pa.ArrowInvalid as error:
        raise _unreadable(uri, error) from error


def _unreadable(uri: str, error: Exception) -> FeatureError:
    return FeatureError(
        f"{uri} is no file of the form {FORMAT!r}, or is damaged ({error}). Remove it, and run "
        "extract_features.py again."
    )
