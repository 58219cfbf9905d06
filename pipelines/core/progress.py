"""Progress of a run, sent by the workers and shown where the command was started.

Ray prefixes and repeats what workers print. So rank 0 posts lines to a small actor, and the driver,
whose standard output the user sees (or `ray job logs -f` shows), prints them.
"""

import threading
import time
from typing import Any

import ray

from pipelines.core.clock import duration


class _Board:
    """Keeps lines until the driver fetches them."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def post(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


class ProgressPrinter:
    """Prints in the driver what workers post, while the `with` block runs.

    Example:
        with ProgressPrinter() as progress:
            trainer = TorchTrainer(..., train_loop_config={"board": progress.board})
            trainer.fit()
    """

    def __init__(self, *, interval: float = 1.0) -> None:
        self.board: Any = ray.remote(num_cpus=0)(_Board).remote()
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _flush(self) -> None:
        for line in ray.get(self.board.take.remote()):
            print(line, flush=True)

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


class _Counts:
    """Counts what the tasks have done, and keeps the failures until they are fetched."""

    def __init__(self) -> None:
        self._videos, self._seconds = 0, 0.0
        self._failures: list[str] = []

    def done(self, video_id: str, seconds: float, reason: str) -> None:
        self._videos += 1
        self._seconds += seconds
        if reason:
            self._failures.append(f"{video_id}: {reason}")

    def take(self) -> tuple[int, float, list[str]]:
        failures, self._failures = self._failures, []
        return self._videos, self._seconds, failures


class ShardProgress:
    """Prints, while the `with` block runs, how far it is and which videos fail.

    Args:
        shards: Number of shards to make.
        videos: Number of videos in them.
        seconds: Of these videos.
        interval: Seconds from line to line.

    Attributes:
        board: Actor that tasks tell of each video: `done(video_id, seconds, reason)`.
    """

    def __init__(self, *, shards: int, videos: int, seconds: float, interval: float = 5.0) -> None:
        self.board: Any = ray.remote(num_cpus=0)(_Counts).remote()
        self._shards, self._videos, self._seconds = shards, videos, seconds
        self._done = 0
        self._interval = interval
        self._began = time.perf_counter()
        self._shown: tuple[int, int] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def shard_done(self) -> None:
        """Counts a shard that is whole."""
        self._done += 1

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._show()

    def _show(self) -> None:
        videos, seconds, failures = ray.get(self.board.take.remote())
        for failure in failures:
            print(f"  failed: {failure}", flush=True)
        if (self._done, videos) == self._shown or not videos:
            return
        self._shown = self._done, videos
        speed = seconds / (time.perf_counter() - self._began)
        left = max(0.0, self._seconds - seconds) / speed
        print(
            f"shard {self._done}/{self._shards}  video {videos}/{self._videos}  "
            f"{speed:.1f} s of video per second  {duration(left)} left",
            flush=True,
        )

    def __enter__(self) -> "ShardProgress":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show()
        ray.kill(self.board)
