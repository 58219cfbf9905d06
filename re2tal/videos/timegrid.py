"""Mapping between frames, features and seconds of a window; no other module does this."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # a process that only decodes video should not have to import torch
    from torch import Tensor

_Coordinate = TypeVar("_Coordinate", float, np.ndarray, "Tensor")


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeGrid:
    """Regular grid of frames over a part of a video, and of the features made from them.

    Frame `i` covers `[offset + i / fps, offset + (i + 1) / fps)` and is sampled at its middle.
    Feature `j` is made from frames `j * stride` to `(j + 1) * stride - 1` and sits at coordinate
    `j` of the feature grid, the middle of these frames. The window therefore spans feature
    coordinates from -0.5 to `num_features - 0.5`. Second `t` has the feature coordinate
    `(t - offset) * fps / stride - 0.5`.

    Attributes:
        fps: sampled frames per second of video (not the file's own rate).
        stride: frames per feature: the backbone's temporal stride.
        length: frames in the window, a multiple of `stride`.
        offset: second of the video at which the window starts.

    Raises:
        ValueError: a field is out of its range.
    """

    fps: float
    stride: int
    length: int
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"TimeGrid.fps must be a positive number, not {self.fps}.")
        if self.stride < 1:
            raise ValueError(f"TimeGrid.stride must be at least 1 frame, not {self.stride}.")
        if self.length < 1 or self.length % self.stride:
            raise ValueError(
                f"TimeGrid.length must be a positive multiple of the stride ({self.stride} frames),"
                f" not {self.length}."
            )
        if not math.isfinite(self.offset):
            raise ValueError(f"TimeGrid.offset must be a finite number, not {self.offset}.")

    @property
    def num_features(self) -> int:
        """Features in the window: `length / stride`."""
        return self.length // self.stride

    @property
    def duration(self) -> float:
        """Seconds that the window spans."""
        return self.length / self.fps

    @property
    def end(self) -> float:
        """Second of the video at which the window ends."""
        return self.offset + self.duration

    def frame_times(self) -> np.ndarray:
        """Compute the seconds at which the frames are sampled, their middles, float64 (length,)."""
        return self.offset + (np.arange(self.length) + 0.5) / self.fps

    def frames_before(self, seconds: float) -> int:
        """Count the frames of the window sampled before a second of the video."""
        # The tolerance of 1e-6 frames: rounding must not decide whether the last frame counts of a
        # video that ends with the window.
        frames = math.ceil((seconds - self.offset) * self.fps - 0.5 - 1e-6)
        return min(max(frames, 0), self.length)

    def to_features(self, seconds: _Coordinate) -> _Coordinate:
        """Convert seconds of the video to feature coordinates, of the same type and shape."""
        return (seconds - self.offset) * (self.fps / self.stride) - 0.5

    def to_seconds(self, grid: _Coordinate) -> _Coordinate:
        """Convert feature coordinates to seconds of the video: the inverse of `to_features`."""
        return (grid + 0.5) * (self.stride / self.fps) + self.offset
