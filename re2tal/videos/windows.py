"""Cutting of videos into windows of a fixed number of frames, with their instances."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from re2tal.annotations import VideoAnnotation
from re2tal.errors import check_within
from re2tal.videos.decoding import Source
from re2tal.videos.pieces import Pieces, decode_source
from re2tal.videos.stitching import Copy, StitchConfig, clip_starts, magnified
from re2tal.videos.timegrid import TimeGrid


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig:
    """Settings of the cutting of videos into windows.

    Attributes:
        frames: frames in a window, a multiple of the backbone's temporal stride.
        fps: frames sampled per second; None samples every video, whatever its duration, into one
            window (as is usual for ActivityNet).
        overlap: overlap of consecutive windows as a share of a window, from 0 to 0.99.
        sliding_overlap: overlap of the sliding windows that cover a video for detection; None for
            `overlap`.
        min_visible: smallest share of an instance that must lie inside a window for the instance to
            be kept, clipped to the window. An instance longer than the window must fill this share
            of the window instead.
        stitch: video self-stitching (VSGN): training also uses clips around short actions, and a
            clip that fills a small part of a window gets a magnified copy after it.

    Raises:
        ValueError: a field is out of its range.
    """

    frames: int
    fps: float | None
    overlap: float = 0.25
    sliding_overlap: float | None = None
    min_visible: float = 0.75
    stitch: StitchConfig = field(default_factory=StitchConfig)

    def __post_init__(self) -> None:
        check_within(
            self,
            frames=(1, 2**20),
            fps=(1e-3, 1e4),
            overlap=(0, 0.99),  # with more, every second would be in hundreds of windows
            sliding_overlap=(0, 0.99),
            min_visible=(1e-6, 1),
        )

    def grid(self, duration: float, *, stride: int) -> TimeGrid:
        """Grid of the first window of a video of `duration` s, with `stride` frames per feature."""
        fps = self.frames / duration if self.fps is None else self.fps
        return TimeGrid(fps=fps, stride=stride, length=self.frames)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Window:
    """Part of a video and the instances in it: plain data that can be serialised.

    Attributes:
        video_id: id of the video.
        grid: grid of the frames; its offset is the start of the window in the video.
        valid: number of frames inside the video, at the start of the window; after them there is
            padding, or the gap and the copy of a stitched window.
        segments: start and end of each instance in units of the feature grid, float32 of shape
            (N, 2), inside [-0.5, num_features - 0.5]. A stitched window has each of them twice.
        labels: class numbers, int64 of shape (N,).
        copy: magnified copy of the valid frames at the end of a stitched window.
        place: place of the visible square along the longer side of the frames: 0 at the left or the
            top, 1 at the right or the bottom.
        backwards: true if the valid frames are in reversed order and the segments mirrored.
    """

    video_id: str
    grid: TimeGrid
    valid: int
    segments: np.ndarray
    labels: np.ndarray
    copy: Copy | None = None
    place: float = 0.5
    backwards: bool = False

    def mask(self) -> np.ndarray:
        """Compute the mask of frames that show the video, bool `(length,)`; others are black."""
        frame = np.arange(self.grid.length)
        shown = frame < self.valid
        return shown if self.copy is None else shown | (frame >= self.copy.first)

    def frame_times(self) -> np.ndarray:
        """Compute the seconds of the video at which the frames of `mask` are sampled, float64."""
        times = self.grid.frame_times()
        if self.copy is not None:
            times[self.copy.first :] = self.copy.grid.frame_times()[self.copy.first :]
        shown: np.ndarray = times[self.mask()]
        return shown[::-1] if self.backwards else shown


def training_windows(
    video: VideoAnnotation,
    classes: Sequence[str],
    config: WindowConfig,
    *,
    stride: int,
    random: np.random.Generator,
) -> list[Window]:
    """Cut a video into windows at random places that together show all of it.

    The first window starts with the video and the last one ends with it. Between them, windows
    start every (1 - overlap) window lengths, from a random place on. The number of windows depends
    only on the video, so every epoch has the same number. The random place varies by at least half
    a step, so over the epochs every instance of up to (1 + overlap) / 2 window lengths is seen
    whole. A video no longer than a window gives one window, padded or stitched. With
    `config.stitch`, stitched clips around the short actions of the longer videos follow.

    Args:
        video: annotated video.
        classes: all labels; a label's index is its class number.
        config: settings of the windows.
        stride: frames per feature: the backbone's temporal stride.
        random: generator of the places, seeded by run and epoch.

    Returns:
        The windows by start, then the clips by start.
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
    """Draw the starts of the windows of `training_windows`."""
    if _fits(duration, grid):
        return [0.0]
    step = grid.duration * (1 - overlap)
    last = duration - grid.duration
    between = math.ceil(last / step - 0.5)  # windows between the first and the last
    # The first and the last step may be shorter than `step`, but no step may be longer.
    second = random.uniform(max(0.0, last - between * step), min(step, last - (between - 1) * step))
    return [0.0, *(second + i * step for i in range(between)), last]


def _clips(
    video: VideoAnnotation,
    classes: Sequence[str],
    config: WindowConfig,
    grid: TimeGrid,
    random: np.random.Generator,
) -> list[Window]:
    """Cut stitched clips around the short actions of a video that is not stitched itself."""
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


def at_speed(
    window: Window,
    video: VideoAnnotation,
    classes: Sequence[str],
    config: WindowConfig,
    *,
    speed: float,
    share: float,
) -> Window:
    """Cut a training window again, so that its actions are shown `speed` times as fast.

    The new window has the same number of frames and spans `speed` times as many seconds. A shorter
    one lies inside the given window. A longer one contains the given window and lies inside the
    video; if the video is shorter, the rest is padding.

    Args:
        window: window of `training_windows` that is not stitched.
        video: annotated video from which the window was cut.
        classes: all labels, as for the window.
        config: settings of the window.
        speed: factor; 1 returns the window itself.
        share: place of the shorter window inside the longer one, from 0, the start, to 1, the end.

    Raises:
        ValueError: the window is stitched: its frames have two rates already.
    """
    if config.stitch.enabled:
        raise ValueError("Stitched windows have two rates already: their speed cannot change.")
    if speed == 1:
        return window
    grid = window.grid
    seconds = speed * grid.duration
    shown = min(grid.duration, video.duration - grid.offset)
    start = grid.offset + share * (shown - seconds)
    offset = max(0.0, min(start, video.duration - seconds))  # 0 if the video is too short
    return _window(video, classes, config, replace(grid, fps=grid.fps / speed, offset=offset))


def reversed_window(window: Window) -> Window:
    """Reverse the valid frames of a window and mirror its segments; padding stays at the end.

    Raises:
        ValueError: the window is stitched.
    """
    if window.copy is not None:
        raise ValueError("A stitched window shows two parts of a video: it cannot be reversed.")
    grid = window.grid
    last = window.valid / grid.stride - 1  # new coordinate of the first feature
    mirrored = last - window.segments.astype(np.float64)[:, ::-1]
    # the video may end up to half a frame after its last frame
    inside = mirrored.clip(-0.5, grid.num_features - 0.5)
    return replace(window, segments=inside.astype(np.float32), backwards=not window.backwards)


def sliding_windows(
    video: VideoAnnotation, classes: Sequence[str], config: WindowConfig, *, stride: int
) -> list[Window]:
    """Cover a video with overlapping windows.

    The last window ends with the video and may overlap more. A video no longer than a window gives
    one window, padded or stitched.

    See `training_windows` for the arguments; the windows are sorted by start.
    """
    grid = config.grid(video.duration, stride=stride)
    if _fits(video.duration, grid):
        return [_window(video, classes, config, grid)]
    overlap = config.overlap if config.sliding_overlap is None else config.sliding_overlap
    step = grid.duration * (1 - overlap)
    last = video.duration - grid.duration
    # 1e-9: rounding must not add a window that repeats the last one
    starts = [min(i * step, last) for i in range(math.ceil(last / step - 1e-9) + 1)]
    return [_window(video, classes, config, replace(grid, offset=start)) for start in starts]


def decode_window(
    source: Source | Pieces, window: Window, *, size: int | None, threads: int = 1
) -> np.ndarray:
    """Decode the frames of a window; padding after the video's end and gaps are black.

    Args:
        source: video in one file or in pieces.
        window: window to decode.
        size: short side in pixels, as for `decode`.
        threads: decoding threads.

    Returns:
        RGB frames, uint8 of shape (length, H, W, 3).

    Raises:
        VideoError: the video cannot be decoded there.
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
    """Decode the square part of a window's frames that a network sees, by default the middle.

    Args:
        source: video in one file or in pieces.
        window: window to decode.
        size: side of the square in pixels, to which the frames' short side is scaled.
        threads: decoding threads.

    Returns:
        uint8 RGB `(T, size, size, 3)`, contiguous, black where the window's mask is false.

    Raises:
        VideoError: the video cannot be decoded there.
    """
    frames = decode_window(source, window, size=size, threads=threads)
    top, left = (int((side - size) * window.place) for side in frames.shape[1:3])
    return np.ascontiguousarray(frames[:, top : top + size, left : left + size])


def _fits(duration: float, grid: TimeGrid) -> bool:
    """Tell if the video fits into one window, with a tolerance of half a frame."""
    return duration <= grid.duration + 0.5 / grid.fps


def _window(
    video: VideoAnnotation,
    classes: Sequence[str],
    config: WindowConfig,
    grid: TimeGrid,
    *,
    most: int | None = None,
) -> Window:
    """Make a window with its visible instances; `most` limits it to its first frames."""
    shown = grid.length if most is None else most
    end = min(grid.offset + shown / grid.fps, video.duration)
    seconds, labels = _visible(
        video, classes, grid.offset, end, share=config.min_visible, whole=shown / grid.fps
    )
    # a video shorter than half a frame still has one
    valid = max(1, min(grid.frames_before(video.duration), shown))
    segments = grid.to_features(seconds)
    copy = magnified(grid, valid, config.stitch)
    if copy:
        # the video may end up to half a frame after its last frame
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
    """Find the instances with at least `share` of their length between two seconds.

    For an instance longer than `whole` seconds, `whole` counts as its length.

    Returns:
        Segments clipped to the two seconds, (N, 2), and labels, (N,).
    """
    numbers = {label: number for number, label in enumerate(classes)}
    segments, labels = [], []
    for instance in video.instances:
        start, end = max(instance.start, first), min(instance.end, last)
        # 1e-9: with a share of 1, rounding must not drop an instance that lies inside
        if end - start >= share * min(instance.end - instance.start, whole) - 1e-9:
            segments.append((start, end))
            labels.append(numbers[instance.label])
    return np.array(segments, np.float64).reshape(-1, 2), np.array(labels, np.int64)
