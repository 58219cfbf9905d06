"""Clips of a fixed number of frames, cut from trimmed videos."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import Window


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimmedVideo:
    """Part of a video file that shows one class.

    Attributes:
        video_id: unique name of the part.
        label: class number.
        start: second of the file at which the part begins.
        end: second of the file at which the part ends.

    Raises:
        ValueError: the part has no length.
    """

    video_id: str
    label: int
    start: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end < math.inf:
            raise ValueError(
                f"{self.video_id}: a trimmed video needs 0 <= start < end, not {self.start:g} to "
                f"{self.end:g} s."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """Length and rate of the clips that a network sees.

    Attributes:
        frames: frames of a clip, a multiple of the backbone's temporal stride.
        fps: frames sampled per second.

    Raises:
        ValueError: a field is out of its range.
    """

    frames: int = 32
    fps: float = 15.0

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"ClipConfig.frames must be at least 1, not {self.frames}.")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"ClipConfig.fps must be a positive number, not {self.fps}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """Number of clips and crops over which the scores of a video are averaged.

    Attributes:
        clips: number of clips, spread evenly over the video; a single clip is in the middle.
        crops: number of squares, spread evenly over the longer side of the frames; a single one is
            in the middle. Each is decoded separately.

    Raises:
        ValueError: a number is less than one.
    """

    clips: int = 1
    crops: int = 1

    def __post_init__(self) -> None:
        if min(self.clips, self.crops) < 1:
            raise ValueError(
                f"ViewConfig needs at least 1 clip and 1 crop, not {self.clips} and {self.crops}."
            )


def random_clip(
    video: TrimmedVideo, config: ClipConfig, *, stride: int, random: np.random.Generator
) -> Window:
    """Cut one clip at a random place of a video; a shorter video is padded.

    Args:
        video: trimmed video.
        config: length and rate of the clip.
        stride: frames per feature: the backbone's temporal stride.
        random: generator of the place, seeded by run and epoch; one number per video is drawn.
    """
    share = random.uniform()  # even if it has no effect, so that other videos' places stay the same
    return _clip(video, config, stride=stride, share=share, place=0.5)


def views(
    video: TrimmedVideo, config: ClipConfig, view: ViewConfig, *, stride: int
) -> Iterator[Window]:
    """Yield the clips and crops whose scores are averaged for a video, clip by clip.

    The range of possible starts is divided into as many equal parts as there are clips, and each
    clip starts in the middle of one part. A video no longer than a clip gives one clip. `stride` is
    the backbone's temporal stride, in frames.
    """
    clips = view.clips if _room(video, config) > 0 else 1
    places = [0.5] if view.crops == 1 else np.linspace(0.0, 1.0, view.crops).tolist()
    for number in range(clips):
        for place in places:
            share = (number + 0.5) / clips
            yield _clip(video, config, stride=stride, share=share, place=place)


def _room(video: TrimmedVideo, config: ClipConfig) -> float:
    """Compute the range of possible starts of a clip, in seconds."""
    return max(0.0, video.end - video.start - config.frames / config.fps)


def _clip(
    video: TrimmedVideo, config: ClipConfig, *, stride: int, share: float, place: float
) -> Window:
    offset = video.start + share * _room(video, config)
    grid = TimeGrid(fps=config.fps, stride=stride, length=config.frames, offset=offset)
    valid = max(1, grid.frames_before(video.end))  # a video shorter than half a frame still has one
    shown = grid.to_features(np.array([[offset, min(grid.end, video.end)]]))
    return Window(
        video_id=video.video_id,
        grid=grid,
        valid=valid,
        segments=shown.astype(np.float32),
        labels=np.array([video.label], np.int64),
        place=place,
    )
