"""Files of features: the columns of a Parquet file, and what `features.json` says of a folder.

Features lie in `.npy` files, one a video, as ActionFormer and many others read them, or in Parquet
files of some videos each. `features.json` beside them says where in their videos they lie, so that
a reader has nothing to guess.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from pipelines.features.sampling import Sampling
from pipelines.storage import file_sizes, join, read_bytes, replacing
from re2tal.videos.features import clip_grid, resampled_grid
from re2tal.videos.timegrid import TimeGrid

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


class FeatureError(Exception):
    """Features that cannot be used; the message says which, why and what to do."""


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
        FeatureError: if nothing says it, or what does is damaged.
    """
    uri = join(folder, NAME)
    if NAME not in file_sizes(folder):
        raise FeatureError(
            f"{folder} has no {NAME}, which says where in their videos features lie. If "
            f"extract_features.py did not make them, {HOW_TO_SAY}."
        )
    try:
        return DESCRIPTION.validate_json(read_bytes(uri))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise FeatureError(
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
