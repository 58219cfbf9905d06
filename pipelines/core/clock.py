"""Where a worker's time goes, and how times are told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who only tells times needs no localizers
    from pipelines.data.batches import Batch


class Clock:
    """Splits a worker's time into waiting for data and working on it, and counts frames."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._frames = 0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes batches on and adds up how long each was waited for.

        Args:
            batches: of one epoch.
        """
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - before
            if batch is None:
                return
            self._frames += batch.mask.numel()
            yield batch

    @property
    def elapsed(self) -> float:
        """Seconds since the epoch began."""
        return time.perf_counter() - self._start

    def metrics(self, world_size: int) -> dict[str, float]:
        """Returns speed and waiting so far, as MLflow names them.

        Args:
            world_size: number of workers, all as fast as this one.
        """
        return {
            "train/frames_per_second": world_size * self._frames / self.elapsed,
            "train/data_wait_share": self._waited / self.elapsed,
        }


def duration(seconds: float) -> str:
    """Formats seconds as minutes and seconds, or hours and minutes: `3:07`, `2 h 05`.

    Args:
        seconds: a duration, not negative.
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60} h {minutes % 60:02d}"
