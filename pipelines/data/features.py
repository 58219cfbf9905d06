"""Files of features: their format, and reading them.

Features lie in `.npy` files, one a video, as ActionFormer and many others read them, or in Parquet
files of several videos each. `features.json` beside them gives the places of features in their
videos, so that no reader has to guess.
"""

import io
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from pipelines.core.storage import Stamp, absolute, file_sizes, join, read_bytes, replacing
from pipelines.data.sampling import Sampling
from pipelines.data.store import Contents, Store
from re2tal.annotations import as_named, normal_form
from re2tal.errors import UserError, check_within
from re2tal.videos.features import clip_grid, resampled_grid, window_features
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import Window

FORMAT: Literal["re2tal features 1"] = "re2tal features 1"
NAME = "features.json"
FOLDER = "features"
"""Folder of the Parquet files, in the folder of `features.json`."""

Layout = Literal["npy", "parquet"]
FeatureType = Literal["float32", "float16"]

CENTRES = "feature j belongs to second offset + (j + 0.5) * stride / fps of its video"

_EXAMPLE = (
    '{"format": "re2tal features 1", "layout": "npy", "prefix": "", "ending": ".npy", '
    '"clips": {"fps": 30.0, "stride": 4, "frames": 16}}'
)
HOW_TO_SAY = (
    f"write {NAME} such as {_EXAMPLE} for ActionFormer's features of clips, or with "
    '"resampled": true instead of "clips" for features that span their whole video'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoEntry:
    """Place of a video's features.

    Attributes:
        file: path of the features' file in the folder.
        row: row of a Parquet file; 0 otherwise.
        length: T, the number of features.
        fps: sampled frames per second.
        stride: frames per feature.
        offset: second at which the span of the first feature starts.
        duration: length of the video in seconds.
        source: signs by which the video's file is recognised; None in files of older versions.
    """

    file: str
    row: int = 0
    length: int
    fps: float
    stride: int
    offset: float
    duration: float
    source: Stamp | None = None

    def __post_init__(self) -> None:
        check_within(self, row=(0, 2**31), length=(1, 2**31), fps=(1e-6, 1e6), stride=(1, 2**31))
        check_within(self, offset=(-1e9, 1e9), duration=(1e-6, 1e9))

    @property
    def grid(self) -> TimeGrid:
        """Places of the features in the video."""
        length = self.length * self.stride
        return TimeGrid(fps=self.fps, stride=self.stride, length=length, offset=self.offset)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """ActionFormer's description of features of clips.

    Attributes:
        fps: frames per second (`default_fps`).
        stride: frames from the start of one clip to that of the next (`feat_stride`).
        frames: number of frames of a clip (`num_frames`).
    """

    fps: float
    stride: int
    frames: int

    def __post_init__(self) -> None:
        check_within(self, fps=(1e-6, 1e6), stride=(1, 2**31), frames=(1, 2**31))


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """Content of `features.json`.

    For features that other programs made, `format`, `layout`, and `clips` or `resampled` suffice.

    Attributes:
        state: "complete" once every video has either features or a failure.
        prefix: start of the name of a `.npy` file, before the video's id.
        ending: end of the name, after the id.
        centres: meaning of `fps`, `stride` and `offset`, in words.
        channels: C; None if it is not known.
        actionformer: the fields of ActionFormer's configuration for these features.
        settings: settings that determine the features.
        software: versions of the software that made the features.
        clips: places of the features of videos that are not in `videos`.
        resampled: the features of videos not in `videos` span the whole video, whatever their
            number.
        failures: video id to the reason why it has no features.
    """

    format: Literal["re2tal features 1"] = FORMAT
    state: Literal["complete", "incomplete"] = "complete"
    layout: Layout
    prefix: str = ""
    ending: str = ".npy"
    centres: str = CENTRES
    channels: int | None = None
    actionformer: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    clips: Clips | None = None
    resampled: bool = False
    videos: dict[str, VideoEntry] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def gives_places(self) -> bool:
        """Tell whether the description gives the places of any video's features."""
        return bool(self.videos or self.clips or self.resampled)

    def grid(self, video_id: str, *, length: int, duration: float) -> TimeGrid:
        """Return the grid of a video's `length` features over `duration` seconds."""
        if video_id in self.videos:
            return self.videos[video_id].grid
        if self.clips is not None:
            clips = self.clips
            return clip_grid(fps=clips.fps, stride=clips.stride, frames=clips.frames, length=length)
        return resampled_grid(duration=duration, length=length)


FEATURES: Store[VideoEntry, Description] = Store(
    format=FORMAT,
    folder=FOLDER,
    name=NAME,
    script="extract_features.py",
    contents=TypeAdapter(Contents[VideoEntry]),
    description=TypeAdapter(Description),
    advice=f"If extract_features.py did not make them, {HOW_TO_SAY}.",
)


def schema(kind: FeatureType) -> pa.Schema:
    """Return the columns of a Parquet file; each video is one row and one row group."""
    return pa.schema(
        [
            ("video_id", pa.string()),
            ("subset", pa.string()),  # empty without annotations
            ("length", pa.int32()),  # T
            ("channels", pa.int32()),  # C
            ("fps", pa.float64()),
            ("stride", pa.int32()),
            ("offset", pa.float64()),  # `CENTRES` defines fps, stride and offset
            ("duration", pa.float64()),  # of the video, in seconds
            ("source", pa.string()),  # path or URI of the video
            ("features", pa.large_list(pa.type_for_alias(kind))),  # T x C values, row by row
        ]
    )


def in_actionformers_words(sampling: Sampling, channels: int) -> dict[str, Any]:
    """Describe features in `.npy` files with the fields of ActionFormer's configuration files."""
    squeezed = sampling.fps == "squeeze"
    # `num_frames` is the clip length in ActionFormer. Where features span their video it counts in
    # feature strides; a window's feature belongs to the middle of its own `stride` frames.
    frames = 1 if squeezed else sampling.frames if sampling.way == "clips" else sampling.stride
    return {
        "input_dim": channels,
        "feat_stride": -1 if squeezed else sampling.stride,
        "num_frames": frames,
        "default_fps": sampling.fps if isinstance(sampling.fps, float) else None,
    }


def read_description(folder: str) -> Description:
    """Read `features.json` of a folder.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    description = FEATURES.read_description(folder)
    if description is None:
        raise UserError(
            f"{folder} has no {NAME}, which gives the places of features in their videos. "
            f"{FEATURES.advice}"
        )
    return description


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExtractedVideo:
    """Features of a video, and the other columns of its row in a Parquet file.

    Attributes:
        entry: place of the features; its file and row may not be known yet.
        subset: name in the annotations; empty without annotations.
        source: path or URI of the video.
        features: shape (T, C).
    """

    entry: VideoEntry
    subset: str
    source: str
    features: np.ndarray


def write_npy(uri: str, features: np.ndarray) -> None:
    """Write one video's features, of shape (T, C)."""
    buffer = io.BytesIO()
    np.save(buffer, features, allow_pickle=False)
    with replacing(uri) as stream:
        stream.write(buffer.getbuffer())


def read_array(uri: str) -> np.ndarray:
    """Read the array in a `.npy` file; in a `.npz`, the only array or the one named `feats`.

    Raises:
        UserError: if there is no array of shape (T, C).
        OSError: if the file cannot be reached.
    """
    content = io.BytesIO(read_bytes(uri))
    try:
        # no pickles: they could run code
        found = np.load(content, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            name = "feats" if "feats" in found.files or len(found.files) != 1 else found.files[0]
            found = found[name]
    except Exception as error:  # a damaged file raises errors of NumPy, zip, a tokenizer, memory
        raise UserError(f"{uri} cannot be read as an array: {error}") from error
    return _checked(uri, found)


def _checked(uri: str, features: np.ndarray) -> np.ndarray:
    if features.ndim != 2 or not features.size or features.dtype.kind != "f":
        raise UserError(
            f"{uri} must hold floating numbers of shape (T, C), but holds {features.dtype} of "
            f"shape {features.shape}."
        )
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{uri} holds numbers that are not finite (nan or inf) in {int((~finite).sum())} of "
            f"{len(features)} features, the first of them number {int(finite.argmin())}: make it "
            "again."
        )
    return features


def write_parquet(
    folder: str,
    name: str,
    videos: Mapping[str, ExtractedVideo],
    *,
    kind: FeatureType,
    settings: dict[str, Any],
    failures: dict[str, str],
) -> Contents[VideoEntry]:
    """Write the features of videos into one file, in the order of their ids.

    `name` is the path of the file in `folder`, where `features.json` is; `failures` gives the
    reasons for those of the file's videos that have no features.
    """
    columns = schema(kind)
    with FEATURES.writing(join(folder, name), columns, settings, dictionaries=["subset"]) as writer:
        for video_id, video in sorted(videos.items()):
            writer.contents.videos[video_id] = replace(video.entry, file=name, row=writer.rows)
            writer.write(_row(video_id, video, columns))
        writer.contents.failures.update(failures)
    return writer.contents


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


def read_row(uri: str, row: int) -> tuple[str, ExtractedVideo]:
    """Read a video from a Parquet file.

    Returns:
        The video's id and its features.

    Raises:
        UserError: if the file is damaged.
        OSError: if the file cannot be reached.
    """
    parquet, contents = FEATURES.open(uri)
    with parquet:
        try:
            table = parquet.read_row_group(row, use_threads=False)
            plain = table.drop_columns(["features"]).to_pylist()[0]
            values = table["features"].combine_chunks().values.to_numpy(zero_copy_only=False)
            values = values.reshape(plain["length"], plain["channels"])
        except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
            raise FEATURES.unreadable(uri, error) from error
    features = _checked(uri, values)
    return plain["video_id"], ExtractedVideo(
        entry=contents.videos[plain["video_id"]],
        subset=plain["subset"],
        source=plain["source"],
        features=features,
    )


# Accepted gap between the end of the features and that of their video, as a share of its duration
# or in seconds, whichever is larger: clips end early, and files and annotations differ in length.
_SHARE, _SECONDS = 0.1, 5.0
# From this share on, the fps or stride in `features.json` must be wrong, as with half the frames
# per second or twice the stride.
_WRONG = 0.4
_READERS = 16  # threads that read features at once
_TRANSPOSED = "; is it of shape (C, T)? (T, C) is needed: write the array's .T"


def _gap(duration: float) -> float:
    return max(_SECONDS, _SHARE * duration)


class Features:
    """Folder of features; it holds plain data and no open file, so that it can be pickled.

    Args:
        folder: path or URI of the folder, with `features.json` in it.

    Attributes:
        channels: C of all videos.

    Raises:
        UserError: if the folder holds no features, or does not give their places in the videos.
    """

    def __init__(self, folder: str) -> None:
        self._folder = absolute(folder)
        self._description = read_description(self._folder)
        if self._description.state != "complete":
            raise FEATURES.incomplete(self._folder)
        if not self._description.gives_places:
            raise UserError(
                f"{join(self._folder, NAME)} does not say where in their videos the features lie, "
                f"or there are none: {HOW_TO_SAY}."
            )
        self._files = self._find_files()
        self._ids = {normal_form(video_id): video_id for video_id in self._files}
        # the channels of each file are compared with those of `_model`; a file of another number
        # of channels and of the length `_length_if_transposed` is one of shape (C, T)
        if self._description.channels:
            self._model = join(self._folder, NAME)
            self.channels = self._length_if_transposed = self._description.channels
        else:
            self._model, self._length_if_transposed, self.channels = self._first_file()

    @property
    def video_ids(self) -> tuple[str, ...]:
        """Sorted ids of the videos that have features."""
        return tuple(sorted(self._files))

    @property
    def durations(self) -> dict[str, float]:
        """Video id to the video's seconds, as far as they are known."""
        return {video_id: entry.duration for video_id, entry in self._description.videos.items()}

    def uri(self, video_id: str) -> str:
        """Return the path or URI of a video's file of features; the id is one of `video_ids`."""
        return join(self._folder, self._files[self._ids[normal_form(video_id)]])

    def missing(self, video_ids: Iterable[str]) -> dict[str, str]:
        """Return those of some videos that have no features: video id to reason."""
        nothing = f"{self._folder} has no features of it"
        lacking = [v for v in video_ids if normal_form(v) not in self._ids]
        why = as_named(self._description.failures, lacking)
        return {v: why.get(v, nothing) for v in lacking}

    def read(self, video_id: str, *, duration: float) -> tuple[np.ndarray, TimeGrid]:
        """Read the features of a video, and their grid; `duration` is the video's, in seconds.

        Returns:
            Floating-point features of shape (T, C), and their grid.

        Raises:
            UserError: if the video has no features, or they are damaged.
            OSError: if their file cannot be reached.
        """
        if normal_form(video_id) not in self._ids:
            raise UserError(f"{video_id}: {self.missing([video_id])[video_id]}")
        video_id = self._ids[normal_form(video_id)]
        uri = self.uri(video_id)
        if self._description.layout == "parquet":
            row = self._description.videos[video_id].row
            held, video = read_row(uri, row)
            if held != video_id:
                raise UserError(f"{uri} has another video than {video_id} in row {row}.")
            features = video.features
        else:
            features = read_array(uri)
        if features.shape[1] != self.channels:
            hint = _TRANSPOSED if len(features) == self._length_if_transposed else ""
            raise UserError(
                f"{uri} has {features.shape[1]} channels where {self._model} has "
                f"{self.channels}{hint}."
            )
        grid = self._description.grid(video_id, length=len(features), duration=duration)
        if grid.num_features != len(features):
            raise UserError(
                f"{uri} holds {len(features)} features of {video_id}, but {NAME} says that there "
                f"are {grid.num_features}."
            )
        if abs(grid.end - duration) > max(_SECONDS, _WRONG * duration):
            raise UserError(
                f"{uri} holds features up to second {grid.end:.1f} of a video of {duration:.1f} s, "
                f"if {NAME} is right: correct its fps and stride"
                f"{self._hint(video_id, features, duration)}."
            )
        return features, grid

    def _hint(self, video_id: str, features: np.ndarray, duration: float) -> str:
        """Return a hint if the features would last as long as the video when transposed."""
        grid = self._description.grid(video_id, length=features.shape[1], duration=duration)
        return _TRANSPOSED if abs(grid.end - duration) <= _gap(duration) else ""

    def window(self, window: Window, *, duration: float) -> np.ndarray:
        """Read the features of a window of a video of `duration` seconds.

        Returns:
            float32 of shape (T', C), resampled by `re2tal.videos.features.window_features`.

        Raises:
            UserError, OSError: see `read`.
        """
        features, grid = self.read(window.video_id, duration=duration)
        return window_features(features, grid, window)

    def examine(self, durations: Mapping[str, float]) -> tuple[dict[str, str], list[str]]:
        """Read each video's features once, skipping videos without features.

        Args:
            durations: annotated seconds by video id.

        Returns:
            Video id to the reason why its features cannot be used; and a sentence for each video
            whose features end well before or after its annotated end.
        """
        wanted = sorted(v for v in durations if normal_form(v) in self._ids)
        with ThreadPoolExecutor(_READERS) as pool:  # most of the time goes into waiting for storage
            results = pool.map(lambda v: self._examined(v, durations[v]), wanted)
            found = dict(zip(wanted, results, strict=True))
        remarks = [
            f"{v}: its features end at second {end:.1f}, but it lasts {durations[v]:.1f}"
            for v, end in found.items()
            if isinstance(end, float) and abs(end - durations[v]) > _gap(durations[v])
        ]
        return {v: end for v, end in found.items() if isinstance(end, str)}, remarks

    def _examined(self, video_id: str, duration: float) -> float | str:
        """Return the second at which a video's features end, or why they cannot be used."""
        try:
            return self.read(video_id, duration=duration)[1].end
        except (UserError, OSError) as error:
            return str(error)

    def _find_files(self) -> dict[str, str]:
        """Map video ids to the names of their files."""
        description = self._description
        if description.clips is None and not description.resampled:
            return {video_id: entry.file for video_id, entry in description.videos.items()}
        names = [
            name
            for name in file_sizes(self._folder)
            if name.startswith(description.prefix) and name.endswith(description.ending)
        ]
        return {
            name[len(description.prefix) : len(name) - len(description.ending)]: name
            for name in names
        }

    def _first_file(self) -> tuple[str, int, int]:
        """Read the first readable file; return its path or URI, T and C.

        If the file is transposed itself, its T is the length of all transposed files.
        """
        if not self._files:
            raise UserError(
                f"{self._folder} holds no features: no file is named {self._description.prefix}"
                f"ID{self._description.ending}."
            )
        problems = []
        for video_id in self.video_ids:
            try:
                length, channels = read_array(self.uri(video_id)).shape
                return self.uri(video_id), length, channels
            except UserError as error:
                problems.append(str(error))
        raise UserError(f"No file of features can be used: {problems[0]}")
