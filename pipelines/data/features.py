"""Files of features: their form, and reading them.

Features lie in `.npy` files, one a video, as ActionFormer and many others read them, or in Parquet
files of some videos each. `features.json` beside them gives their places in the videos, so that a
reader has nothing to guess.
"""

import io
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from pipelines.core.storage import absolute, file_sizes, join, read_bytes, replacing
from pipelines.data.sampling import Sampling
from pipelines.data.store import Contents, Store
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
        file: path of their file in the folder.
        row: row of a Parquet file; 0 otherwise.
        length: T, their number.
        fps: sampled frames per second.
        stride: frames per feature.
        offset: second at which the span of the first feature starts.
        duration: length of the video in seconds.
    """

    file: str
    row: int = 0
    length: int
    fps: float
    stride: int
    offset: float
    duration: float

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
        state: "complete" once every video is through, whether or not it failed.
        prefix: beginning of the name of a `.npy` file, before the video's id.
        ending: end of the name, behind the id.
        centres: meaning of `fps`, `stride` and `offset`, in words.
        channels: C; None if it is not known.
        actionformer: the same in ActionFormer's words, as far as it has any.
        settings: settings that decide the features.
        software: versions of the software that made them.
        clips: places of the features of videos that are not in `videos`.
        resampled: these span their whole video, however many they are.
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
    def says_where(self) -> bool:
        """Tell whether it gives the places of any video's features."""
        return bool(self.videos or self.clips or self.resampled)

    def grid(self, video_id: str, *, length: int, duration: float) -> TimeGrid:
        """Return the places of a video's features, `length` of them over `duration` seconds."""
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
    """Return the columns of a Parquet file; a row is a video, and a row group."""
    return pa.schema(
        [
            ("video_id", pa.string()),
            ("subset", pa.string()),  # empty without annotations
            ("length", pa.int32()),  # T
            ("channels", pa.int32()),  # C
            ("fps", pa.float64()),
            ("stride", pa.int32()),
            ("offset", pa.float64()),  # `CENTRES` says what these three mean
            ("duration", pa.float64()),  # of the video, in seconds
            ("source", pa.string()),  # path or URI of the video
            ("features", pa.large_list(pa.type_for_alias(kind))),  # T x C values, row by row
        ]
    )


def in_actionformers_words(sampling: Sampling, channels: int) -> dict[str, Any]:
    """Describe features in `.npy` files as ActionFormer's configuration files do."""
    squeezed = sampling.fps == "squeeze"
    # where features span their video, a share of the distance between two; a feature of a window
    # belongs to the middle of the frames that it was made for
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
    said = FEATURES.read_description(folder)
    if said is None:
        raise UserError(
            f"{folder} has no {NAME}, which says where in their videos features lie. "
            f"{FEATURES.advice}"
        )
    return said


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExtractedVideo:
    """Features of a video, and what goes into a Parquet file with them.

    Attributes:
        entry: place of the features; its file and row may be unknown yet.
        subset: name in the annotations; empty without.
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
    """Read the array in a `.npy` file, or the one called `feats`, or the only one, in a `.npz`.

    Raises:
        UserError: if it holds none of shape (T, C).
        OSError: if it cannot be reached.
    """
    content = io.BytesIO(read_bytes(uri))
    try:
        # nothing in it is unpickled: that could run code
        found = np.load(content, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            name = "feats" if "feats" in found.files or len(found.files) != 1 else found.files[0]
            found = found[name]
    except Exception as error:  # of any kind: of NumPy, zip, a tokenizer, for any amount of memory
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
    """Write some videos' features, in the order of their ids.

    `name` is the path of the file in `folder`, where `features.json` is; `failures` are the reasons
    of the file's videos that have no features.
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
        OSError: if it cannot be reached.
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


# Largest accepted gap between the ends of features and of their video, as a share of it or in
# seconds: clips end early, and files and annotations do not last equally long.
_SHARE, _SECONDS = 0.1, 5.0
# Share from which the rule that gives the features' places must be that of another folder: half as
# many frames a second, or twice the stride.
_WRONG = 0.4
_READERS = 16  # threads that read features at once
_TURNED = "; is it of shape (C, T)? (T, C) is needed: write the array's .T"


def _gap(duration: float) -> float:
    return max(_SECONDS, _SHARE * duration)


class Features:
    """A folder of features; plain data until a video is read, so that it can travel.

    Args:
        folder: path or URI of the folder, with `features.json` in it.

    Attributes:
        channels: C of all videos.

    Raises:
        UserError: if it holds no features, or does not say where in their videos they lie.
    """

    def __init__(self, folder: str) -> None:
        self._folder = absolute(folder)
        self._said = read_description(self._folder)
        if self._said.state != "complete":
            raise FEATURES.incomplete(self._folder)
        if not self._said.says_where:
            raise UserError(
                f"{join(self._folder, NAME)} does not say where in their videos the features lie, "
                f"or there are none: {HOW_TO_SAY}."
            )
        self._files = self._find_files()
        channels = self._said.channels
        said = join(self._folder, NAME), channels or 0, channels or 0
        # the second: the length of features that are like the model, but of shape (C, T)
        self._model, self._turned, self.channels = said if channels else self._measured()

    @property
    def video_ids(self) -> tuple[str, ...]:
        """Sorted ids of the videos that have features."""
        return tuple(sorted(self._files))

    @property
    def durations(self) -> dict[str, float]:
        """Video id to seconds of the videos, as far as they are known."""
        return {video_id: entry.duration for video_id, entry in self._said.videos.items()}

    def uri(self, video_id: str) -> str:
        """Return the path or URI of the file of the features of one of `video_ids`."""
        return join(self._folder, self._files[video_id])

    def missing(self, video_ids: Iterable[str]) -> dict[str, str]:
        """Return the reason for each of some videos that has no features, by video id."""
        why = self._said.failures
        nothing = f"{self._folder} has no features of it"
        return {v: why.get(v, nothing) for v in video_ids if v not in self._files}

    def read(self, video_id: str, *, duration: float) -> tuple[np.ndarray, TimeGrid]:
        """Read the features of a video, and their grid; `duration` is the video's, in seconds.

        Returns:
            Floating numbers of shape (T, C), and their grid.

        Raises:
            UserError: if it has none, or they are damaged.
            OSError: if their file cannot be reached.
        """
        if video_id not in self._files:
            raise UserError(f"{video_id}: {self.missing([video_id])[video_id]}")
        uri = self.uri(video_id)
        if self._said.layout == "parquet":
            row = self._said.videos[video_id].row
            held, video = read_row(uri, row)
            if held != video_id:
                raise UserError(f"{uri} has another video than {video_id} in row {row}.")
            features = video.features
        else:
            features = read_array(uri)
        if features.shape[1] != self.channels:
            turned = _TURNED if len(features) == self._turned else ""
            raise UserError(
                f"{uri} has {features.shape[1]} channels where {self._model} has "
                f"{self.channels}{turned}."
            )
        grid = self._said.grid(video_id, length=len(features), duration=duration)
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
        """Return a hint, if the features would last as long as the video when turned."""
        grid = self._said.grid(video_id, length=features.shape[1], duration=duration)
        return _TURNED if abs(grid.end - duration) <= _gap(duration) else ""

    def window(self, window: Window, *, duration: float) -> np.ndarray:
        """Read the features of a window of a video of `duration` seconds.

        Returns:
            float32 of shape (T', C), as `re2tal.videos.features.window_features` takes them.

        Raises:
            UserError, OSError: as `read`.
        """
        features, grid = self.read(window.video_id, duration=duration)
        return window_features(features, grid, window)

    def examine(self, durations: Mapping[str, float]) -> tuple[dict[str, str], list[str]]:
        """Read the features of videos once, as far as there are any.

        Args:
            durations: annotated seconds by video id.

        Returns:
            Video id to the reason why its features cannot be used; and a sentence for each video
            whose features do not last about as long as annotated.
        """
        wanted = sorted(durations.keys() & self._files.keys())
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
        said = self._said
        if said.clips is None and not said.resampled:
            return {video_id: entry.file for video_id, entry in said.videos.items()}
        names = [
            name
            for name in file_sizes(self._folder)
            if name.startswith(said.prefix) and name.endswith(said.ending)
        ]
        return {name[len(said.prefix) : len(name) - len(said.ending)]: name for name in names}

    def _measured(self) -> tuple[str, int, int]:
        """Find the first file that can be read: its place, T and C."""
        if not self._files:
            raise UserError(
                f"{self._folder} holds no features: no file is named {self._said.prefix}"
                f"ID{self._said.ending}."
            )
        problems = []
        for video_id in self.video_ids:
            try:
                length, channels = read_array(self.uri(video_id)).shape
                return self.uri(video_id), length, channels
            except UserError as error:
                problems.append(str(error))
        raise UserError(f"No file of features can be used: {problems[0]}")
