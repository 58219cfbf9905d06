"""Progress of a run, posted by its processes and shown where the command was started.

Ray prefixes and repeats what workers print. So they post to a small actor, and the driver, whose
standard output the user sees (or `ray job logs -f` shows), prints.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from pipelines.core.clock import duration


class _Board:
    """Keeps what is posted until the driver fetches it."""

    def __init__(self) -> None:
        self._posted: list[Any] = []

    def post(self, what: Any) -> None:
        self._posted.append(what)

    def take(self) -> list[Any]:
        posted, self._posted = self._posted, []
        return posted


class ProgressPrinter:
    """Shows in the driver what other processes post, while the `with` block runs.

    Args:
        show: is given each post; by default they are lines to print.
        interval: seconds from one look to the next.

    Attributes:
        board: actor to post to, with `post.remote`.

    Example:
        with ProgressPrinter() as progress:
            trainer = TorchTrainer(..., train_loop_config={"board": progress.board})
            trainer.fit()
    """

    def __init__(self, show: Callable[[Any], None] | None = None, *, interval: float = 1.0) -> None:
        self.board: Any = ray.remote(num_cpus=0)(_Board).remote()
        self._show = show or _print
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _flush(self) -> None:
        for posted in ray.get(self.board.take.remote()):
            self._show(posted)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._flush()

    def __enter__(self) -> "ProgressPrinter":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._flush()
        ray.kill(self.board)


def _print(line: str) -> None:
    print(line, flush=True)


class VideoCounter:
    """Counts the videos that are through, and prints now and then how far a run is.

    Args:
        videos: number of videos.
        seconds: their length.
        interval: seconds from line to line.
    """

    def __init__(self, videos: int, seconds: float, *, interval: float = 5.0) -> None:
        self._videos, self._left = videos, seconds
        self._through, self._made = 0, 0.0
        self._interval = interval
        self._began = self._shown = time.perf_counter()

    @property
    def speed(self) -> float:
        """Seconds of video per second so far."""
        return self._made / (time.perf_counter() - self._began)

    def made(self, seconds: float) -> None:
        """Count a part of a video that is through."""
        self._made += seconds
        self._left -= seconds

    def through(self, *, not_made: float = 0.0) -> None:
        """Count a video that is through.

        Args:
            not_made: seconds of it of which nothing will be made, as it failed.
        """
        self._through += 1
        self._left -= not_made
        if time.perf_counter() - self._shown > self._interval or self._through == self._videos:
            self._shown = time.perf_counter()
            left = f"  {duration(max(0.0, self._left) / self.speed)} left" if self._made else ""
            print(
                f"video {self._through}/{self._videos}  {self.speed:.1f} s of video per second"
                f"{left}",
                flush=True,
            )
