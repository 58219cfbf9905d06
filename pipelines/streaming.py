"""Ray Data's executions, in a process of its own beside each worker.

Ray Data schedules its tasks from a thread of the process that consumes them. In a training process
that thread and PyTorch's wait for each other's interpreter lock, so an actor runs the executions
and the worker only fetches finished batches. And while a consumer is slower than the decoding,
which is how it should be, that thread spins: so what is decoded ahead is bounded by running short
executions to their ends, one after the other, instead of holding a long one back.
"""

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data.dataset import MaterializedDataset

from pipelines.decoding import decode_sample
from pipelines.quiet import quiet_data
from pipelines.resources import DECODE_CPUS

_AHEAD = 3  # batches that lie ready for the worker, beside those of the running execution
_FIRST_BATCHES = 4  # of the first execution: training starts as soon as it is through
_MOST_BYTES = 2**30  # frames that one execution may decode


def portions(rows: int, batch_size: int, bytes_per_row: int) -> Iterator[slice]:
    """Cuts an epoch's rows into executions: a short one first, each then twice as long.

    Args:
        rows: their number.
        batch_size: rows a batch; executions hold whole batches.
        bytes_per_row: of decoded frames; an execution holds at most about a GiB of them.
    """
    most = max(1, _MOST_BYTES // (bytes_per_row * batch_size))
    start, batches = 0, min(_FIRST_BATCHES, most)
    while start < rows:
        end = min(rows, start + batches * batch_size)
        yield slice(start, end)
        start, batches = end, min(2 * batches, most)


class _Stream:
    def batches(
        self, rows: Sequence[dict[str, Any]], size: int, batch_size: int
    ) -> Iterator[dict[str, np.ndarray]]:
        quiet_data()
        bytes_per_row = rows[0]["window"].grid.length * size * size * 3
        cuts = portions(len(rows), batch_size, bytes_per_row)
        with ThreadPoolExecutor(max_workers=1) as ahead:
            waiting = deque([ahead.submit(_decode, rows[next(cuts)], size)])
            while waiting:
                decoded = waiting.popleft().result()
                waiting.extend(ahead.submit(_decode, rows[cut], size) for cut in islice(cuts, 1))
                yield from decoded.iter_batches(batch_size=batch_size, batch_format="numpy")


def _decode(rows: Sequence[dict[str, Any]], size: int) -> MaterializedDataset:
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    dataset = dataset.map(functools.partial(decode_sample, size=size), num_cpus=DECODE_CPUS)
    dataset.context.execution_options.preserve_order = True
    return dataset.materialize()


class FrameStream:
    """Decodes windows with Ray Data, in parallel and in order, just ahead of whoever takes them."""

    def __init__(self) -> None:
        self._actor: Any = ray.remote(num_cpus=0)(_Stream).remote()

    def batches(
        self, rows: Sequence[dict[str, Any]], *, size: int, batch_size: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields what `decode_sample` made of the rows, in batches.

        Args:
            rows: `index`, `uri` and `window` each.
            size: side of the square frames in pixels.
            batch_size: rows a batch; the last one may be smaller.

        Returns:
            Columns of each batch: `index`, `frames`, uint8 (B, T, size, size, 3), and `error`. The
            arrays are read-only.
        """
        method = self._actor.batches.options(
            num_returns="streaming", _generator_backpressure_num_objects=_AHEAD
        )
        for reference in method.remote(rows, size, batch_size):
            yield ray.get(reference)

    def close(self) -> None:
        """Ends the process."""
        ray.kill(self._actor)
