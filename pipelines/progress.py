"""Progress of a run, sent by the workers and shown where the command was started.

Ray prefixes and repeats what workers print. So rank 0 posts lines to a small actor, and the driver,
whose standard output the user sees (or `ray job logs -f` shows), prints them.
"""

import threading
from typing import Any

import ray


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
