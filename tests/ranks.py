"""Two processes of one gloo group that run function after function and import once."""

import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD_SIZE = 2
# Far above what a step takes; a rank that waits for another that never comes ends by it.
PATIENCE = timedelta(seconds=120)


def _serve(rank: int, store: str, pipe: Connection) -> None:
    """Run what comes through the pipe until it is closed; send back the stack of what failed."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE, timeout=PATIENCE
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            function(rank, *arguments)
        except BaseException:
            pipe.send(traceback.format_exc())
        else:
            pipe.send(None)
    dist.destroy_process_group()


class Ranks:
    """Two ranks, started at the first call and after a failure.

    Args:
        folder: folder in which the ranks meet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._starts = 0
        self._ranks: dict[Connection, BaseProcess] = {}

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function on both ranks and wait for them.

        Args:
            function: function of a module, with the rank as its first argument.
            arguments: further arguments, which can be pickled.
        """
        if not self._ranks:
            self._start()
        for pipe in self._ranks:
            pipe.send((function, arguments))
        running = set(self._ranks)
        while running:
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                try:
                    failed = ready.recv()
                except EOFError:
                    failed = "a rank's process ended"
                if failed is not None:
                    self.stop()  # the other may wait for it
                    raise AssertionError(failed)
                running.remove(ready)

    def _start(self) -> None:
        self._starts += 1
        store = str(self._folder / f"store{self._starts}")
        context = get_context("spawn")
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks[ours] = process

    def stop(self) -> None:
        """End the processes, whatever they do."""
        for pipe, process in self._ranks.items():
            pipe.close()
            process.kill()
            process.join()
        self._ranks.clear()
