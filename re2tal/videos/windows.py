"""Cutting videos into windows of a fixed number of frames, with the instances that each shows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from re2tal.annotations import VideoAnnotation
from re2tal.videos.decoding import Source
from re2tal.videos.pieces import Pieces, decode_source
from re2tal.videos.stitching import Copy, StitchConfig, clip_starts, magnified
from re2tal.videos.timegrid import TimeGrid


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig:
    """How videos are cut into windows.

    Attributes:
        frames: Frames in a window, a multiple of the backbone's temporal stride.
        fps: Frames sampled per second; None squeezes every video, whatever its duration, into one
            window (as is usual for ActivityNet).
        overlap: Share of a window that the next one repeats, from 0 to below 1.
        sliding_overlap: The same for sliding windows, with which videos are searched; None for
            `overlap`.
        min_visible: An instance that the border of a window cuts is kept, clipped to the window,
            when at least this share of it is inside; else the window does not show it. Of an
            instance longer than the window, this share of the window must be filled instead.
        stitch: Video self-stitching (VSGN): clips around short actions are trained on as well, and
            what fills a small part of a window gets a magnified copy behind it.

    Raises:
        ValueError: A field is out of its range.
    """

    frames: int
    fps: float | None
    overlap: float = 0.25
    sliding_overlap: float | None = None
    min_visible: float = 0.75
    stitch: StitchConfig = field(default_factory=StitchConfig)

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"WindowConfig.frames must be at least 1, not {self.frames}.")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"WindowConfig.fps must be a positive number, not {self.fps}.")
        for name in ("overlap", "sliding_overlap"):
            overlap = getattr(self, name)
            if overlap is not None and not 0 <= overlap < 1:
                raise ValueError(f"WindowConfig.{name} must be in [0, 1), not {overlap}.")
        if not 0 < self.min_visible <= 1:
            raise ValueError(f"WindowConfig.min_visible must be in (0, 1], not {self.min_visible}.")

    def grid(self, duration: float, *, stride: int) -> TimeGrid:
        """The grid of the first window of a video.

        Args:
            duration: Of the video, in seconds.
            stride: Frames per feature: the backbone's temporal stride.
        """
        fps = self.frames / duration if self.fps is None else self.fps
        return TimeGrid(fps=fps, stride=stride, length=self.frames)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Window:
    """A stretch of a video and the instances in it: plain data, which can travel as it is.

    Attributes:
        video_id: The video.
        grid: Which frames; its offset is where the window starts in the video.
        valid: The first frames that lie inside the video; those after them are padding, or the
            gap and the copy of a stitched window.
        segments: Start and end of each instance in units of the feature grid, float32 of shape
            (N, 2), inside [-0.5, num_features - 0.5]. A stitched window has each of them twice.
        labels: Class numbers, int64 of shape (N,).
        copy: The magnified copy of the valid frames that a stitched window ends with.
        place: Where the square that is seen of the frames lies along their longer side: 0 at the
            left or the top, 1 at the right or the bottom.
    """

    video_id: str
    grid: TimeGrid
    valid: int
    segments: np.ndarray
    labels: np.ndarray
    copy: Copy | None = None
    place: float = 0.5

    def mask(self) -> np.ndarray:
        """Which frames show the video, bool of shape (length,); the others are black."""
        frame = np.arange(self.grid.length)
        shown = frame < self.valid
        return shown if self.copy is None else shown | (frame >= self.copy.first)

    def frame_times(self) -> np.ndarray:
        """Seconds of the video at which the frames of `mask` are sampled, float64."""
        times = self.grid.frame_times()
        if self.copy is not None:
            times[self.copy.first :] = self.copy.grid.frame_times()[self.copy.first :]
        shown: np.ndarray = times[self.mask()]
        return shown


def training_windows(
    video: VideoAnnotation,
    classes: Sequence[str],
    config: WindowConfig,
    *,
    stride: int,
    random: np.random.Generator,
) -> list[Window]:
    """Cuts a video into windows at random places, so that together they show all of it.

    The first window starts with the video and the last one ends with it; in between, one starts
    every (1 - overlap) window lengths from a random place on. Their number depends on the video
    only, so that every epoch has as many. The place varies by at least half of that step, so that
    over the epochs every instance of up to (1 + overlap) / 2 window lengths is seen whole.
    A video no longer than a window gives one window, padded or stitched. With `config.stitch`,
    stitched clips around the short actions of the longer videos follow.

    Args:
        video: The video.
        classes: All labels; a label's place is its class number.
        config: How to cut.
        stride: Frames per feature: the backbone's temporal stride.
        random: Draws the places; one that follows the seed and the epoch.

    Returns:
        The windows in the order in which they start, then the clips likewise.
    """
    grid = config.grid(video.duration, stride=stride)
    windows = [
        _window(video, classes, config, replace(grid, offset=start))
        for start in _random_starts(video.duration, grid, config.overlap, random)
    ]
    return windows + _clips(video, classes, config, grid, random)


def _random_starts(
    duration: float, grid: TimeGrid, overlap: float, random: np.random.Generator
) -> list[float]:
    """Where the windows of `training_windows` start."""
    if _fits(duration, grid):
        return [0.0]
    step = grid.duration * (1 - overlap)
    last = duration - grid.duration
    between = math.ceil(last / step - 0.5)
    # the steps from the first window to the second and to the last from the one before are shorter
    second = random.uniform(max(0.0, last - between * step), min(step, last - (between - 1) * step))
    return [0.0, *(second + i * step for i in range(between)), last]


def _clips(
    video: VideoAnnotation,
    classes: Sequence[str],
    config: WindowConfig,
    grid: TimeGrid,
    random: np.random.Generator,
) -> list[Window]:
    """Stitched clips around the short actions of a video that is not stitched itself."""
    if not config.stitch.enabled:
        return []
    frames = max(1, int(config.stitch.clip * grid.length))
    if grid.frames_before(video.duration) <= config.stitch.short * grid.length:
        return []
    starts = clip_starts(video.instances, video.duration, frames / grid.fps, random)
    return [
        _window(video, classes, config, replace(grid, offset=start), most=frames)
        for start in starts
    ]


def sliding_windows(
    video: VideoAnnotation, classes: Sequence[str], config: WindowConfig, *, stride: int
) -> list[Window]:
    """Covers a video with windows that each repeat a share of the one before.

    The last window ends with the video and may repeat more. A video no longer than a window gives
    one window, padded or stitched.

    Args:
        video: The video.
        classes: All labels; a label's place is its class number.
        config: How to cut.
        stride: Frames per feature: the backbone's temporal stride.

    Returns:
        The windows in the order in which they start.
    """
    grid = config.grid(video.duration, stride=stride)
    if _fits(video.duration, grid):
        return [_window(video, classes, config, grid)]
    overlap = config.overlap if config.sliding_overlap is None else config.sliding_overlap
    step = grid.duration * (1 - overlap)
    last = video.duration - grid.duration
    starts = [min(i * step, last) for i in range(math.ceil(last / step - 1e-9) + 1)]
    return [_window(video, classes, config, replace(grid, offset=start)) for start in starts]


def decode_window(
    source: Source | Pieces, window: Window, *, size: int | None, threads: int = 1
) -> np.ndarray:
    """Decodes the frames of a window; padding behind the video's end and gaps are black.

    Args:
        source: The video, in one file or in pieces.
        window: Which frames.
        size: Short side in pixels, as for `decode`.
        threads: Decoding threads.

    Returns:
        RGB frames, uint8 of shape (length, H, W, 3).

    Raises:
        VideoError: The video cannot be decoded there.
    """
    frames = decode_source(source, window.frame_times(), size=size, threads=threads)
    if len(frames) == window.grid.length:
        return frames
    padded = np.zeros((window.grid.length, *frames.shape[1:]), np.uint8)
    padded[window.mask()] = frames
    return padded


def window_frames(
    source: Source | Pieces, window: Window, *, size: int, threads: int = 1
) -> np.ndarray:
    """Decodes what a network sees of a window: a square of its frames, by default the middle one.

    Args:
        source: the video, in one file or in pieces.
        window: which frames.
        size: the side of the square in pixels, to which the frames' short side is scaled.
        threads: for decoding.

    Returns:
        uint8 RGB `(T, size, size, 3)`, contiguous, black where the window's mask is false.

    Raises:
        VideoError: if the video cannot be decoded there.
    """
    frames = decode_window(source, window, size=size, threads=threads)
    top, left = (int((side - size) * window.place) for side in frames.shape[1:3])
    return np.ascontiguousarray(frames[:, top : top + size, left : left + size])


def _fits(duration: float, grid: TimeGrid) -> bool:
    """Whether one window holds the video; half a frame that sticks out is not worth another."""
    return duration <= grid.duration + 0.5 / grid.fps


def _window(
    video: VideoAnnotation,
    classes: Sequence[str],
    config: WindowConfig,
    grid: TimeGrid,
    *,
    most: int | None = None,
) -> Window:
    """One window with the instances that it shows, in its first `most` frames if that is given."""
    shown = grid.length if most is None else most
    end = min(grid.offset + shown / grid.fps, video.duration)
    seconds, labels = _visible(
        video, classes, grid.offset, end, share=config.min_visible, whole=shown / grid.fps
    )
    # a video shorter than half a frame still shows one
    valid = max(1, min(grid.frames_before(video.duration), shown))
    segments = grid.to_features(seconds)
    copy = magnified(grid, valid, config.stitch)
    if copy:
        # the video may end up to half a frame after its last one
        again = np.minimum(copy.grid.to_features(seconds), grid.num_features - 0.5)
        segments, labels = np.concatenate([segments, again]), np.concatenate([labels, labels])
    return Window(
        video_id=video.video_id,
        grid=grid,
        valid=valid,
        segments=segments.astype(np.float32),
        labels=labels,
        copy=copy,
    )


def _visible(
    video: VideoAnnotation,
    classes: Sequence[str],
    first: float,
    last: float,
    *,
    share: float,
    whole: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The instances of which `share` lies between two seconds, clipped to them: (N, 2) and (N,).

    Of an instance longer than `whole` seconds, `whole` counts instead of its length.
    """
    numbers = {label: number for number, label in enumerate(classes)}
    segments, labels = [], []
    for instance in video.instances:
        start, end = max(instance.start, first), min(instance.end, last)
        if end - start >= share * min(instance.end - instance.start, whole) - 1e-9:
            segments.append((start, end))
            labels.append(numbers[instance.label])
    return np.array(segments, np.float64).reshape(-1, 2), np.array(labels, np.int64)
