"""Files of features: the columns of a Parquet file, and what `features.json` says of a folder.

Features lie in `.npy` files, one a video, as ActionFormer and many others read them, or in Parquet
files of some videos each. `features.json` beside them says where in their videos they lie, so that
a reader has nothing to guess.
"""

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from pipelines.core.storage import absolute, file_sizes, join, read_bytes, replacing, resolve
from re2tal.errors import UserError
from re2tal.videos.features import clip_grid, resampled_grid, window_features
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import Window

Way = Literal["clips", "windows"]

_MOST_BYTES = 64 * 2**20  # of frames that are decoded at a time, if a batch of units takes less


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How a video becomes a sequence of features.

    Attributes:
        way: "clips": a short clip for every feature, averaged over its time, as published features
            for ActionFormer and VSGN are made. "windows": long windows, of which the backbone makes
            features at its own rate: what a detector that is trained end to end sees.
        fps: sampled frames per second; "own" is each video's own rate, "squeeze" gives every video,
            whatever its duration, one window (as is usual for ActivityNet).
        frames: of a clip or window; by default 16 of a clip, 768 of a window.
        stride: frames per feature. Of clips, from the start of one to that of the next, by default
            4; of windows the backbone's own, or a multiple of it, to which features are averaged.
        overlap: share of a window that the next one repeats, from 0 to below 1. Each feature is
            taken from the window in whose middle it is.

    Raises:
        ValueError: if a field is out of its range.
    """

    way: Way = "clips"
    fps: float | Literal["own", "squeeze"] = "own"
    frames: int | None = None
    stride: int | None = None
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if not isinstance(self.fps, str) and not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"--fps must be a positive number, own or squeeze, not {self.fps}.")
        if self.way == "clips" and self.fps == "squeeze":
            raise ValueError(
                "--fps squeeze goes with --way windows: it gives every video one window. For clips "
                "give a number, or own."
            )
        for name in ("frames", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}.")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"--overlap must be in [0, 1), not {self.overlap}.")

    def resolved(self, *, temporal_stride: int, multiple: int) -> "Sampling":
        """The settings with nothing left open.

        Args:
            temporal_stride: frames per feature, of the backbone.
            multiple: the number of frames that the backbone is given is a multiple of this.

        Raises:
            ValueError: if the backbone cannot take so many frames.
        """
        frames = self.frames or (16 if self.way == "clips" else 768)
        stride = (self.stride or 4) if self.way == "clips" else temporal_stride
        if frames % multiple:
            raise ValueError(
                f"--frames must be a multiple of {multiple}, which the backbone takes at a time, "
                f"not {frames}."
            )
        return Sampling(
            way=self.way, fps=self.fps, frames=frames, stride=stride, overlap=self.overlap
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """`SamplingConfig` with nothing left open.

    Attributes:
        way: "clips" or "windows".
        fps: sampled frames per second, "own" or "squeeze".
        frames: of a clip or window.
        stride: frames per feature.
        overlap: share of a window that the next one repeats.
    """

    way: Way
    fps: float | Literal["own", "squeeze"]
    frames: int
    stride: int
    overlap: float

    def described(self) -> dict[str, Any]:
        """What decides where features lie, and what they see, for files of them."""
        described = asdict(self)
        if self.way == "clips":
            del described["overlap"]  # they have none
        return described

    def of(self, *, duration: float, own_fps: float) -> "SampledVideo":
        """How one video is sampled.

        Args:
            duration: of the video, in seconds.
            own_fps: its own frames per second.
        """
        fps = self.fps
        if fps == "own":
            fps = own_fps
        elif fps == "squeeze":
            fps = self.frames / duration
        # a video shorter than half a frame still shows one
        shown = max(1, _frame_grid(fps, 0, math.ceil(duration * fps) + 1).frames_before(duration))
        if self.way == "clips":
            return self._clips(fps, shown)
        return self._windows(fps, shown)

    def _clips(self, fps: float, shown: int) -> "SampledVideo":
        """As many clips as lie whole in the video, and one of a shorter video."""
        number = max(0, shown - self.frames) // self.stride + 1
        return SampledVideo(
            grid=clip_grid(fps=fps, stride=self.stride, frames=self.frames, length=number),
            shown=shown,
            step=self.stride,
            last=self.stride * (number - 1),
            frames=self.frames,
            per_unit=1,
        )

    def _windows(self, fps: float, shown: int) -> "SampledVideo":
        """Windows that start on features, so that all of the video's lie on one grid."""
        features, window = math.ceil(shown / self.stride), self.frames // self.stride
        return SampledVideo(
            grid=TimeGrid(fps=fps, stride=self.stride, length=features * self.stride),
            shown=shown,
            step=self.stride * max(1, int(window * (1 - self.overlap))),
            last=self.stride * max(0, features - window),
            frames=self.frames,
            per_unit=window,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stretch:
    """Frames of a video that are decoded at a time, and the units in them.

    Attributes:
        window: which frames.
        starts: first frame of each unit, counted from that of the stretch, int64.
    """

    window: Window
    starts: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledVideo:
    """A video cut into units, each of which goes through the backbone once: clips or windows.

    Attributes:
        grid: where its features lie.
        shown: sampled frames that the video has.
        step: frames from the start of one unit to that of the next; to that of the last it may be
            less.
        last: where the last one starts.
        frames: of a unit.
        per_unit: features of a unit.
    """

    grid: TimeGrid
    shown: int
    step: int
    last: int
    frames: int
    per_unit: int

    @property
    def units(self) -> int:
        """Number of units."""
        return -(-self.last // self.step) + 1

    def starts(self) -> np.ndarray:
        """First frame of each unit, int64."""
        return np.minimum(np.arange(self.units) * self.step, self.last)

    def stretches(self, *, size: int, batch_size: int) -> Iterator[Stretch]:
        """Cuts the video into stretches of whole batches of units.

        What units of a stretch have in common is decoded once. Frames behind the video's end are
        padding: its window's mask is false there.

        Args:
            size: side of the square frames in pixels.
            batch_size: units that go through the backbone at a time.
        """
        most = max(0, _MOST_BYTES // (size * size * 3) - self.frames) // self.step + 1
        together = max(1, most // batch_size) * batch_size
        starts = self.starts()
        for first in range(0, len(starts), together):
            held = starts[first : first + together]
            length = int(held[-1] - held[0]) + self.frames
            yield Stretch(
                window=Window(
                    video_id="",
                    grid=_frame_grid(self.grid.fps, int(held[0]), length),
                    valid=min(length, self.shown - int(held[0])),
                    segments=np.zeros((0, 2), np.float32),
                    labels=np.zeros(0, np.int64),
                ),
                starts=held - held[0],
            )

    def joined(self, units: np.ndarray) -> np.ndarray:
        """The features of the video.

        Where windows overlap, a feature is that of the window whose middle is nearest: it has seen
        most of what lies on both of its sides.

        Args:
            units: features of each unit, of shape (U, per_unit, C).

        Returns:
            Shape (grid.num_features, C).
        """
        first = self.starts() // self.grid.stride
        place = np.arange(self.grid.num_features)
        middles = first + (self.per_unit - 1) / 2
        # of two that are as near, the first
        chosen = np.searchsorted((middles[1:] + middles[:-1]) / 2, place, side="left")
        joined: np.ndarray = units[chosen, place - first[chosen]]
        return joined


def _frame_grid(fps: float, first: int, length: int) -> TimeGrid:
    """The grid of some sampled frames of a video."""
    return TimeGrid(fps=fps, stride=1, length=length, offset=first / fps)


FORMAT: Literal["re2tal features 1"] = "re2tal features 1"
NAME = "features.json"
FOLDER = "features"
"""Where Parquet files lie, in the folder of `features.json`."""

FOOTER_KEY = "re2tal"
"""Of the metadata in a Parquet file's footer that hold its `FileContents` as JSON."""

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
    """A video's features.

    Attributes:
        file: in which they are, relative to the folder.
        row: in a Parquet file; 0 otherwise.
        length: T, their number.
        fps: sampled frames per second.
        stride: frames per feature.
        offset: second at which the span of the first feature starts.
        duration: of the video, in seconds.
    """

    file: str
    row: int = 0
    length: int
    fps: float
    stride: int
    offset: float
    duration: float

    @property
    def grid(self) -> TimeGrid:
        """Where they lie in the video."""
        length = self.length * self.stride
        return TimeGrid(fps=self.fps, stride=self.stride, length=length, offset=self.offset)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """How ActionFormer describes features of clips.

    Attributes:
        fps: frames per second (`default_fps`).
        stride: frames from the start of one clip to that of the next (`feat_stride`).
        frames: in a clip (`num_frames`).
    """

    fps: float
    stride: int
    frames: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What `features.json` says.

    For features that other programs made, `format`, `layout`, and `clips` or `resampled` suffice.

    Attributes:
        format: of the file.
        state: "complete" once every video is through, whether or not it failed.
        layout: of the files.
        prefix: of the name of a `.npy` file, before the video's id.
        ending: of the name, behind the id.
        centres: what `fps`, `stride` and `offset` mean, in words.
        channels: C; None if it is not known.
        actionformer: what ActionFormer's configuration calls these things, if it has names for it.
        settings: what decides the features.
        software: versions of what made them.
        clips: where the features of videos lie that are not in `videos`.
        resampled: these span their whole video, however many they are.
        videos: video id to where its features are.
        failures: video id to why it has none.
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
        """Whether it says where the features of any video lie."""
        return bool(self.videos or self.clips or self.resampled)

    def grid(self, video_id: str, *, length: int, duration: float) -> TimeGrid:
        """Where a video's features lie.

        Args:
            video_id: the video.
            length: number of its features.
            duration: of the video, in seconds.
        """
        if video_id in self.videos:
            return self.videos[video_id].grid
        if self.clips is not None:
            clips = self.clips
            return clip_grid(fps=clips.fps, stride=clips.stride, frames=clips.frames, length=length)
        return resampled_grid(duration=duration, length=length)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileContents:
    """What a Parquet file holds, as its footer says.

    Attributes:
        settings: what decides the features.
        videos: video id to where its features are.
        failures: video id to why it has none.
    """

    settings: dict[str, Any]
    videos: dict[str, VideoEntry]
    failures: dict[str, str]


DESCRIPTION: TypeAdapter[Description] = TypeAdapter(Description)
FILE_CONTENTS: TypeAdapter[FileContents] = TypeAdapter(FileContents)


def schema(kind: FeatureType) -> pa.Schema:
    """The columns of a Parquet file; a row is a video, and a row group.

    Args:
        kind: of the features.
    """
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
            ("features", pa.large_list(pa.type_for_alias(kind))),  # T x C values, C of each first
        ]
    )


def in_actionformers_words(sampling: Sampling, channels: int) -> dict[str, Any]:
    """Features in `.npy` files as ActionFormer's configuration files describe them.

    Args:
        sampling: how videos were sampled.
        channels: C.
    """
    squeezed = sampling.fps == "squeeze"
    # of features that span their video, a share of the distance between two; a feature of a window
    # belongs to the middle of the frames that it was made for
    frames = 1 if squeezed else sampling.frames if sampling.way == "clips" else sampling.stride
    return {
        "input_dim": channels,
        "feat_stride": -1 if squeezed else sampling.stride,
        "num_frames": frames,
        "default_fps": sampling.fps if isinstance(sampling.fps, float) else None,
    }


def read_description(folder: str) -> Description:
    """Reads what a folder of features holds.

    Args:
        folder: path or URI of the folder.

    Raises:
        UserError: if nothing says it, or what does is damaged.
    """
    uri = join(folder, NAME)
    if NAME not in file_sizes(folder):
        raise UserError(
            f"{folder} has no {NAME}, which says where in their videos features lie. If "
            f"extract_features.py did not make them, {HOW_TO_SAY}."
        )
    try:
        return DESCRIPTION.validate_json(read_bytes(uri))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{uri} is not of the form {FORMAT!r}, or is damaged: {error.error_count()} problems, "
            f"the first in {where}: {first['msg']}. If extract_features.py did not make them, "
            f"{HOW_TO_SAY}."
        ) from error


def write_description(folder: str, description: Description) -> None:
    """Writes what a folder of features holds, in the place of an older file.

    Args:
        folder: path or URI of the folder.
        description: what it holds.
    """
    with replacing(join(folder, NAME)) as stream:
        stream.write(DESCRIPTION.dump_json(description, indent=1))


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
        UserError: if it holds none of shape (T, C).
        OSError: if it cannot be reached.
    """
    try:
        # nothing in it is unpickled: that could run code
        found = np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            name = "feats" if "feats" in found.files or len(found.files) != 1 else found.files[0]
            found = found[name]
    except (ValueError, EOFError, KeyError) as error:
        raise UserError(f"{uri} cannot be read as an array: {error}") from error
    return _checked(uri, found)


def _checked(uri: str, features: np.ndarray) -> np.ndarray:
    if features.ndim != 2 or not features.size or features.dtype.kind != "f":
        raise UserError(
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
        UserError: if it is no file of features.
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
        UserError: if it is damaged.
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


def _unreadable(uri: str, error: Exception) -> UserError:
    return UserError(
        f"{uri} is no file of the form {FORMAT!r}, or is damaged ({error}). Remove it, and run "
        "extract_features.py again."
    )


# Features may end so long before or after their video, as a share of it or in seconds, before it
# is a disagreement: clips end early, and files and annotations do not last equally long.
_SHARE, _SECONDS = 0.1, 5.0
# Where the places of features follow from a rule that somebody wrote down, a larger share means
# that the rule is another folder's: half as many frames a second, or twice the stride.
_WRONG = 0.4


class Features:
    """A folder of features; plain data until a video is read, so that it can travel.

    Args:
        folder: path or URI of the folder, with `features.json` in it.

    Attributes:
        channels: C, of all videos.

    Raises:
        UserError: if it holds no features, or does not say where in their videos they lie.
    """

    def __init__(self, folder: str) -> None:
        self._folder = absolute(folder)
        self._said = read_description(self._folder)
        if self._said.state != "complete":
            raise UserError(
                f"{self._folder} is not complete. Give the command with extract_features.py that "
                "made it again: it goes on."
            )
        if not self._said.says_where:
            raise UserError(
                f"{join(self._folder, NAME)} does not say where in their videos the features lie, "
                f"or there are none: {HOW_TO_SAY}."
            )
        self._files = self._find_files()
        self.channels = self._said.channels or self._measured()

    @property
    def layout(self) -> Layout:
        """Of the files."""
        return self._said.layout

    @property
    def video_ids(self) -> tuple[str, ...]:
        """The videos that have features, sorted."""
        return tuple(sorted(self._files))

    def uri(self, video_id: str) -> str:
        """The path or URI of the file of a video's features.

        Args:
            video_id: one of `video_ids`.
        """
        return join(self._folder, self._files[video_id])

    def missing(self, video_ids: Iterable[str]) -> dict[str, str]:
        """Which of some videos have no features.

        Args:
            video_ids: the videos.

        Returns:
            Video id to why.
        """
        why = self._said.failures
        nothing = f"{self._folder} has no features of it"
        return {v: why.get(v, nothing) for v in video_ids if v not in self._files}

    def read(self, video_id: str, *, duration: float) -> tuple[np.ndarray, TimeGrid]:
        """The features of a video and where in it they lie.

        Args:
            video_id: the video.
            duration: of the video, in seconds.

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
            found = read_rows(uri, [row])
            if video_id not in found:
                raise UserError(f"{uri} has another video than {video_id} in row {row}.")
            features = found[video_id].features
        else:
            features = read_array(uri)
        if features.shape[1] != self.channels:
            raise UserError(
                f"{uri} has {features.shape[1]} channels where others have {self.channels}."
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
                f"if {NAME} is right: correct its fps and stride."
            )
        return features, grid

    def window(self, window: Window, *, duration: float) -> np.ndarray:
        """The features of a window; `re2tal.videos.features.window_features` says which.

        Args:
            window: which stretch of which video.
            duration: of the video, in seconds.

        Returns:
            float32 of shape (T', C).

        Raises:
            UserError: if there are none, or they are damaged.
            OSError: if their file cannot be reached.
        """
        features, grid = self.read(window.video_id, duration=duration)
        return window_features(features, grid, window)

    def disagreements(self, durations: Mapping[str, float]) -> dict[str, str]:
        """Videos whose features do not last about as long as they do, if that is known.

        Args:
            durations: video id to seconds, as annotated.

        Returns:
            Video id to what is wrong, in a sentence.
        """
        found = {}
        for video_id in sorted(durations.keys() & self._said.videos.keys()):
            ends, lasts = self._said.videos[video_id].grid.end, durations[video_id]
            if abs(ends - lasts) > max(_SECONDS, _SHARE * lasts):
                found[video_id] = (
                    f"{video_id}: its features end at second {ends:.1f}, but it lasts {lasts:.1f}"
                )
        return found

    def _find_files(self) -> dict[str, str]:
        """Video id to the name of its file."""
        said = self._said
        if said.clips is None and not said.resampled:
            return {video_id: entry.file for video_id, entry in said.videos.items()}
        names = [
            name
            for name in file_sizes(self._folder)
            if name.startswith(said.prefix) and name.endswith(said.ending)
        ]
        return {name[len(said.prefix) : len(name) - len(said.ending)]: name for name in names}

    def _measured(self) -> int:
        """The channels of a folder that does not say them: those of its first video."""
        if not self._files:
            raise UserError(
                f"{self._folder} holds no features: no file is named {self._said.prefix}"
                f"ID{self._said.ending}."
            )
        return int(read_array(join(self._folder, self._files[self.video_ids[0]])).shape[1])
