"""Videos whose features are being made, stretch by stretch, and how far that is."""

import time
from collections.abc import Iterable

import numpy as np

from pipelines.clock import duration
from pipelines.features.files import ExtractedVideo
from pipelines.features.finding import FoundVideo
from pipelines.features.layout import VideoEntry
from pipelines.features.sampling import SampledVideo

_INTERVAL = 5.0  # seconds from line to line


class VideoInTheMaking:
    """Keeps the features of a video's units until all of them are there.

    Args:
        found: the video.
        sampled: how it is sampled.
        subset: of the annotations; empty without.
    """

    def __init__(self, found: FoundVideo, sampled: SampledVideo, subset: str) -> None:
        self.found, self.sampled, self._subset = found, sampled, subset
        self._stretches: dict[int, np.ndarray] = {}

    @property
    def entry(self) -> VideoEntry:
        """Where its features lie; their file is not known yet."""
        grid = self.sampled.grid
        return VideoEntry(
            file="",
            length=grid.num_features,
            fps=grid.fps,
            stride=grid.stride,
            offset=grid.offset,
            duration=self.found.duration,
        )

    @property
    def units_left(self) -> int:
        """Units whose features are not there yet."""
        return self.sampled.units - sum(len(units) for units in self._stretches.values())

    def seconds(self, units: int) -> float:
        """About how much of the video some of its units are.

        Args:
            units: their number.
        """
        return self.found.duration * units / self.sampled.units

    def take(self, number: int, units: np.ndarray) -> ExtractedVideo | None:
        """Takes the features of a stretch; returns those of the video once they are whole.

        Args:
            number: of the stretch, from 0 on.
            units: of shape (U, per_unit, C).
        """
        self._stretches[number] = units
        if self.units_left:
            return None
        whole = np.concatenate([units for _, units in sorted(self._stretches.items())])
        return ExtractedVideo(
            entry=self.entry,
            subset=self._subset,
            source=self.found.uri,
            features=self.sampled.joined(whole),
        )


class MakingProgress:
    """Prints how far a run is.

    Args:
        videos: all whose features are to be made.
    """

    def __init__(self, videos: Iterable[VideoInTheMaking]) -> None:
        videos = list(videos)
        self._videos, self._left = len(videos), sum(video.found.duration for video in videos)
        self._through, self._done = 0, 0.0
        self._began = self._shown = time.perf_counter()

    @property
    def speed(self) -> float:
        """Seconds of video per second so far."""
        return self._done / (time.perf_counter() - self._began)

    def made(self, seconds: float) -> None:
        """Counts what was made.

        Args:
            seconds: of video.
        """
        self._done += seconds
        self._left -= seconds

    def through(self, *, not_made: float = 0.0) -> None:
        """Counts a video that is through.

        Args:
            not_made: seconds of it of which there will be no features, as it failed.
        """
        self._through += 1
        self._left -= not_made
        if time.perf_counter() - self._shown > _INTERVAL or self._through == self._videos:
            self._shown = time.perf_counter()
            speed = self.speed
            left = f"  {duration(max(0.0, self._left) / speed)} left" if speed else ""
            print(
                f"video {self._through}/{self._videos}  {speed:.1f} s of video per second{left}",
                flush=True,
            )
