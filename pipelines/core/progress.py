"""Progress of a command: its own stages, and posts from the processes of a run.

Ray prefixes and repeats what workers print. So workers post to a small actor, and the driver prints
the posts: its standard output is what the user, or `ray job logs -f`, sees.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from pipelines.core.clock import duration

_SECONDS = 5.0  # between two lines of one count


@contextmanager
def doing(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a stage of work while the block runs, before a run has progress of its own.

    A terminal shows a line that disappears at the end; a file, such as a job's log, gets lines.

    Args:
        what: the work, such as "starting Ray".

    Yields:
        Function that shows the progress, given the numbers of finished and of all items.
    """
    from rich.console import Console  # here: workers print nothing and need not import it

    console = Console()
    if console.is_terminal:
        with console.status(f"{what} ...") as status:
            yield lambda done, of: status.update(f"{what}: {done} of {of}")
        return
    _print(f"{what} ...")
    shown = time.perf_counter()

    def count(done: int, of: int) -> None:
        nonlocal shown
        if time.perf_counter() - shown > _SECONDS:
            shown = time.perf_counter()
            _print(f"  {done} of {of}")

    yield count


class _Board:
    """Actor that holds posts until the driver fetches them."""

    def __init__(self) -> None:
        self._posted: list[Any] = []

    def post(self, what: Any) -> None:
        self._posted.append(what)

    def take(self) -> list[Any]:
        posted, self._posted = self._posted, []
        return posted


class ProgressPrinter:
    """Printer, in the driver, of other processes' posts while the `with` block runs.

    Args:
        show: function called with each post; by default posts are lines to print.
        interval: seconds between fetches.

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
    """Counter of finished videos that prints a line of progress from time to time.

    Args:
        videos: number of videos.
        seconds: total length of the videos.
        interval: seconds between lines.
    """

    def __init__(self, videos: int, seconds: float, *, interval: float = _SECONDS) -> None:
        self._videos, self._left = videos, seconds
        self._through, self._made = 0, 0.0
        self._interval = interval
        self._began = self._shown = time.perf_counter()

    @property
    def speed(self) -> float:
        """Seconds of video per second so far."""
        return self._made / (time.perf_counter() - self._began)

    def made(self, seconds: float) -> None:
        """Count finished seconds of a video."""
        self._made += seconds
        self._left -= seconds

    def through(self, *, not_made: float = 0.0) -> None:
        """Count a finished video.

        Args:
            not_made: seconds of the video that will never be finished, because it failed.
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
