"""Sampling of videos: the frames that features are made from, and their places in the video."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from re2tal.videos.features import clip_grid
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import Window

Way = Literal["clips", "windows"]

_MOST_BYTES = 64 * 2**20  # of frames decoded at a time, unless one batch takes more


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Way in which a video becomes a sequence of features.

    Attributes:
        way: "clips": one short clip a feature, averaged over time; published features for
            ActionFormer and VSGN are made in this way. "windows": long windows at the backbone's
            own stride, as in a detector trained end to end.
        fps: sampled frames per second; "own" is each video's own rate, "squeeze" gives every video,
            whatever its duration, one window (as is usual for ActivityNet).
        frames: number of frames of a clip (default 16) or of a window (default 768).
        stride: frames per feature. For clips, the distance between the starts of two clips, by
            default 4. For windows, the backbone's own stride (the default) or a multiple of it, to
            which features are averaged.
        overlap: share of a window that the next window repeats, in [0, 1). Each feature is taken
            from the window whose middle is nearest.

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
        """Fill in the defaults that depend on the backbone.

        Args:
            temporal_stride: frames per feature of the backbone.
            multiple: the backbone's number of input frames must be a multiple of this.

        Raises:
            ValueError: if the backbone cannot take this number of frames.
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
    """`SamplingConfig` with all defaults filled in."""

    way: Way
    fps: float | Literal["own", "squeeze"]
    frames: int
    stride: int
    overlap: float

    def described(self) -> dict[str, Any]:
        """Return the settings that determine features; files of features record them."""
        described = asdict(self)
        if self.way == "clips":
            del described["overlap"]  # clips ignore it
        return described

    def of(self, *, duration: float, own_fps: float) -> "SampledVideo":
        """Lay the units over a video of `duration` seconds with `own_fps` frames per second."""
        fps = self.fps
        if fps == "own":
            fps = own_fps
        elif fps == "squeeze":
            fps = self.frames / duration
        # a video shorter than half a frame interval still has one frame
        shown = max(1, _frame_grid(fps, 0, math.ceil(duration * fps) + 1).frames_before(duration))
        if self.way == "clips":
            return self._clips(fps, shown)
        return self._windows(fps, shown)

    def _clips(self, fps: float, shown: int) -> "SampledVideo":
        """Lay all clips that fit over the video, or one over a video shorter than a clip."""
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
        """Lay windows that start on features, so that all features of the video lie on one grid."""
        features, window = math.ceil(shown / self.stride), self.frames // self.stride
        return SampledVideo(
            grid=TimeGrid(fps=fps, stride=self.stride, length=features * self.stride),
            shown=shown,
            step=self.stride * max(1, int(window * (1 - self.overlap))),
            last=self.stride * max(0, features - window),  # ends with the video's last feature
            frames=self.frames,
            per_unit=window,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stretch:
    """Frames of a video that are decoded together, and the units in them.

    Attributes:
        window: the frames.
        starts: first frame of each unit, counted from the start of the stretch, int64.
    """

    window: Window
    starts: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledVideo:
    """Video cut into units (clips or windows), each of which goes through the backbone once.

    Attributes:
        grid: places of the video's features.
        shown: number of sampled frames of the video.
        step: frames from the start of one unit to the start of the next; the last unit may start
            earlier.
        last: first frame of the last unit.
        frames: number of frames of a unit.
        per_unit: number of features of a unit.
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
        return -(-self.last // self.step) + 1  # ceiling: the last step may be shorter

    def starts(self) -> np.ndarray:
        """Return the first frame of each unit, int64."""
        return np.minimum(np.arange(self.units) * self.step, self.last)

    def stretches(self, *, size: int, batch_size: int) -> Iterator[Stretch]:
        """Cut the video into stretches of whole batches of units.

        A stretch has at most 64 MiB of frames (`size` pixels a side), unless one batch has more.
        Frames that units of a stretch share are decoded once. Frames after the video's end are
        padding: the mask of the stretch's window is false there.
        """
        # k units span (k - 1) * step + frames frames
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
        """Join the features of all units into those of the video.

        Where windows overlap, a feature is taken from the window whose middle is nearest: that
        window holds the most context on both sides.

        Args:
            units: features of each unit, of shape (U, per_unit, C).

        Returns:
            Shape (grid.num_features, C).
        """
        first = self.starts() // self.grid.stride
        place = np.arange(self.grid.num_features)
        middles = first + (self.per_unit - 1) / 2
        # borders halfway between middles; side="left": the first of two equally near windows
        chosen = np.searchsorted((middles[1:] + middles[:-1]) / 2, place, side="left")
        joined: np.ndarray = units[chosen, place - first[chosen]]
        return joined


def _frame_grid(fps: float, first: int, length: int) -> TimeGrid:
    """Return the grid of `length` sampled frames of a video, from frame `first` on."""
    return TimeGrid(fps=fps, stride=1, length=length, offset=first / fps)
