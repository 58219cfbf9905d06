"""Cutting videos into windows of a fixed number of frames, with the instances that each shows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from re2tal.videos.annotations import VideoAnnotation
from re2tal.videos.decoding import Source, decode
from re2tal.videos.timegrid import TimeGrid


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig:
    """How videos are cut into windows.

    Attributes:
        frames: Frames in a window, a multiple of `stride`.
        fps: Frames sampled per second; None squeezes every video, whatever its duration, into one
            window (as is usual for ActivityNet).
        stride: Frames per feature: the backbone's temporal stride.
        overlap: Share of a window that the next one repeats in `sliding_windows`, below 1.
        min_visible: An instance that the border of a window cuts is kept, clipped to the window,
            when at least this share of it is inside; else the window does not show it. Of an
            instance longer than the window, this share of the window must be filled instead.

    Raises:
        ValueError: A field is out of its range.
    """

    frames: int
    fps: float | None
    stride: int
    overlap: float = 0.5
    min_visible: float = 0.75

    def __post_init__(self) -> None:
        TimeGrid(fps=self.fps or 1.0, stride=self.stride, length=self.frames)  # checks these three
        if not 0 <= self.overlap < 1:
            raise ValueError(f"WindowConfig.overlap must be in [0, 1), not {self.overlap}.")
        if not 0 < self.min_visible <= 1:
            raise ValueError(f"WindowConfig.min_visible must be in (0, 1], not {self.min_visible}.")

    def grid(self, duration: float, offset: float = 0.0) -> TimeGrid:
        """The grid of one window of a video that lasts `duration` seconds."""
        fps = self.frames / duration if self.fps is None else self.fps
        return TimeGrid(fps=fps, stride=self.stride, length=self.frames, offset=offset)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Window:
    """A stretch of a video and the instances in it.

    Attributes:
        video_id: The video.
        grid: Which frames; its offset is where the window starts in the video.
        valid: The first frames that lie inside the video; those after them are padding.
        segments: Start and end of each instance in units of the feature grid, float32 of shape
            (N, 2), inside [-0.5, num_features - 0.5].
        labels: Class numbers, int64 of shape (N,).
    """

    video_id: str
    grid: TimeGrid
    valid: int
    segments: np.ndarray
    labels: np.ndarray

    def to_row(self) -> dict[str, Any]:
        """Plain values, for a row of a table: arrays as bytes, so that every row has one type."""
        return {
            "video_id": self.video_id,
            "offset": self.grid.offset,
            "fps": self.grid.fps,
            "stride": self.grid.stride,
            "length": self.grid.length,
            "valid": self.valid,
            "segments": self.segments.astype("<f4").tobytes(),
            "labels": self.labels.astype("<i8").tobytes(),
        }

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "Window":
        """Undoes `to_row`, bit for bit; other columns may be in the row."""
        return Window(
            video_id=str(row["video_id"]),
            grid=TimeGrid(
                fps=float(row["fps"]),
                stride=int(row["stride"]),
                length=int(row["length"]),
                offset=float(row["offset"]),
            ),
            valid=int(row["valid"]),
            segments=np.frombuffer(row["segments"], "<f4").reshape(-1, 2).astype(np.float32),
            labels=np.frombuffer(row["labels"], "<i8").astype(np.int64),
        )


def training_windows(
    video: VideoAnnotation,
    classes: Sequence[str],
    config: WindowConfig,
    *,
    rng: np.random.Generator,
) -> list[Window]:
    """Cuts a video into windows at random places, so that together they show all of it.

    A video of L window lengths gives ceil(L + 1/2) windows: always as many for the same video, so
    that an epoch has a fixed number of steps. The first starts with the video, the last ends with
    it, and those in between follow one another without overlap from a random place on. The place
    varies by at least half a window, so that over the epochs every instance of up to half a window
    is seen whole. A video no longer than a window gives one window, padded.

    Args:
        video: The video.
        classes: All labels; a label's place is its class number.
        config: How to cut.
        rng: Draws the places; use a generator that follows seed, epoch and video.

    Returns:
        The windows in the order in which they start.
    """
    grid = config.grid(video.duration)
    if _fits(video, grid):
        return [_window(video, classes, config, 0.0)]
    length, last = grid.duration, video.duration - grid.duration
    count = math.ceil(video.duration / length + 0.5)
    # by how much the windows together are longer than the video: 1/2 to 3/2 windows
    excess = count * length - video.duration
    # what the second window repeats of the first; the last one repeats the rest of the excess
    repeated = rng.uniform(max(0.0, excess - length), min(excess, length))
    starts = [0.0, *(k * length - repeated for k in range(1, count - 1)), last]
    return [_window(video, classes, config, start) for start in starts]


def sliding_windows(
    video: VideoAnnotation, classes: Sequence[str], config: WindowConfig
) -> list[Window]:
    """Covers a video with windows that each repeat the share `overlap` of the one before.

    The last window ends with the video and may repeat more. A video no longer than a window gives
    one window, padded.

    Args:
        video: The video.
        classes: All labels; a label's place is its class number.
        config: How to cut.

    Returns:
        The windows in the order in which they start.
    """
    grid = config.grid(video.duration)
    if _fits(video, grid):
        return [_window(video, classes, config, 0.0)]
    last = video.duration - grid.duration
    step = grid.duration * (1 - config.overlap)
    count = math.ceil(last / step - 1e-9) + 1
    return [_window(video, classes, config, min(i * step, last)) for i in range(count)]


def decode_window(
    source: Source, window: Window, *, size: int | None, threads: int = 1
) -> np.ndarray:
    """Decodes the frames of a window; the padding behind the video's end is black.

    Args:
        source: The video, as `decode` takes it.
        window: Which frames.
        size: Short side in pixels, as for `decode`.
        threads: Decoding threads.

    Returns:
        RGB frames, uint8 of shape (length, H, W, 3).

    Raises:
        VideoError: The video cannot be decoded there.
    """
    times = window.grid.frame_times()[: window.valid]
    frames = decode(source, times, size=size, threads=threads)
    if window.valid == window.grid.length:
        return frames
    padded = np.zeros((window.grid.length, *frames.shape[1:]), np.uint8)
    padded[: window.valid] = frames
    return padded


def _fits(video: VideoAnnotation, grid: TimeGrid) -> bool:
    """Whether one window holds the video; half a frame that sticks out is not worth another."""
    return video.duration <= grid.duration + 0.5 / grid.fps


def _window(
    video: VideoAnnotation, classes: Sequence[str], config: WindowConfig, offset: float
) -> Window:
    """The window that starts at second `offset`, with the instances that it shows."""
    grid = config.grid(video.duration, offset)
    numbers = {label: number for number, label in enumerate(classes)}
    end = min(grid.end, video.duration)
    segments, labels = [], []
    for instance in video.instances:
        clipped = max(instance.start, offset), min(instance.end, end)
        whole = min(instance.end - instance.start, grid.duration)
        if clipped[1] - clipped[0] >= config.min_visible * whole - 1e-9:
            segments.append(clipped)
            labels.append(numbers[instance.label])
    seconds = np.array(segments, np.float64).reshape(-1, 2)
    return Window(
        video_id=video.video_id,
        grid=grid,
        # a video shorter than half a frame still shows one
        valid=max(1, grid.frames_before(video.duration)),
        segments=grid.to_features(seconds).astype(np.float32),
        labels=np.array(labels, np.int64),
    )
