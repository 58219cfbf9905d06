"""Decoding with Ray Data, from a separate process beside each training worker.

Ray Data schedules its tasks from a thread of the consuming process. In a training process this
thread and PyTorch's would compete for the interpreter lock, so an actor runs the executions and the
worker only fetches finished batches. That thread also spins while the consumer is slower than
decoding, which is the normal case. Decoding ahead is therefore bounded by running short executions
to their ends, one after another, instead of throttling a long one.

Executions are sized by the node's object store, so that frames never spill to disk.
"""

import functools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockAccessor
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.core.cluster import quiet_data
from pipelines.data.decoding import decode_sample

# Executions that run at a time. An execution that begins or ends has too few tasks to keep all
# decoders busy; the other's tasks fill the gap.
_RUNNING = 2
# Executions whose frames are held: those that run, one whose batches are handed out, and the one
# before, which Ray frees a little later.
_HELD = _RUNNING + 2
_AHEAD = 3  # batches fetched to the worker's node before they are asked for
_FIRST_BATCHES = 4  # in the first execution: training starts as soon as it ends
# Limit on an execution's frames. More frames would only wait longer. Shorter executions are more
# executions, and Ray's services keep memory for each (0.45 MB in a node's agent, 0.4 in its
# statistics), which adds up in long runs.
_MOST_BYTES = 4 * 2**30
# Share of the object store for frames. The rest is for everything else in it, and for the frames of
# tasks that end while the batches before them are still being handed out.
_STORE_SHARE = 0.6


def store_needed(batch_bytes: int) -> int:
    """Return the smallest object store, in bytes, with which one worker does not spill."""
    return math.ceil(_HELD * batch_bytes / _STORE_SHARE)


def portion_bytes(batch_bytes: int, store_bytes: float, streams: int) -> int:
    """Return the bytes of frames that one execution may decode, at least one batch.

    `streams` workers share the node's object store.
    """
    share = int(_STORE_SHARE * store_bytes / streams / _HELD)
    return max(batch_bytes, min(_MOST_BYTES, share))


def portions(rows: int, batch_size: int, most: int) -> Iterator[slice]:
    """Cut an epoch's rows into executions: a short one first, each next one twice as long.

    Executions hold whole batches, from one to `most`.
    """
    start, batches = 0, min(_FIRST_BATCHES, most)
    while start < rows:
        end = min(rows, start + batches * batch_size)
        yield slice(start, end)
        start, batches = end, min(2 * batches, most)


class _Stream:
    def __init__(self, streams: int, cpus: float, threads: int) -> None:
        quiet_data()
        self._streams, self._cpus, self._threads = streams, cpus, threads

        self._batches: Iterator[list[ray.ObjectRef]] = iter(())

    def begin(self, rows: Sequence[dict[str, Any]], size: int, batch_size: int, name: str) -> None:
        self._batches = self._run(rows, size, batch_size, name)

    def next(self) -> list[ray.ObjectRef]:
        """Return the blocks of the next batch, one row each; an empty list at the end."""
        return next(self._batches, [])

    def _run(
        self, rows: Sequence[dict[str, Any]], size: int, batch_size: int, name: str
    ) -> Iterator[list[ray.ObjectRef]]:
        batch_bytes = batch_size * rows[0]["window"].grid.length * size * size * 3
        most = portion_bytes(batch_bytes, _store_bytes(), self._streams) // batch_bytes
        cuts = portions(len(rows), batch_size, most)
        with ThreadPoolExecutor(max_workers=_RUNNING) as ahead:
            runs = (ahead.submit(self._decode, rows[cut], size, name) for cut in cuts)
            running = deque(islice(runs, _RUNNING))
            while running:
                decoded = running.popleft().result()
                running.extend(islice(runs, 1))
                while decoded:  # popped: a reference kept here would keep the frames in the store
                    yield [decoded.popleft() for _ in range(min(batch_size, len(decoded)))]

    def _decode(self, rows: Sequence[dict[str, Any]], size: int, name: str) -> deque[ray.ObjectRef]:
        decode = functools.partial(decode_sample, size=size, threads=self._threads)
        dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows))
        dataset = dataset.map(decode, num_cpus=self._cpus)
        dataset.set_name(name)
        dataset.context.execution_options.preserve_order = True
        # No budgets: portions bound the memory already, and logical CPUs the tasks. When several
        # executions share a small cluster, Ray Data rounds each one's share down, often to zero.
        # With zero CPUs it decodes one window at a time; with zero memory it looks for decoded
        # windows only every ten seconds, and spins in between.
        dataset.context.set_config("backpressure_policies.enabled", [])
        return deque(dataset.materialize().to_arrow_refs())


def _store_bytes() -> float:
    """Return the size of this node's object store."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return float(node["Resources"]["object_store_memory"])


class FrameStream:
    """Decoder of windows with Ray Data, in parallel and in order, just ahead of its consumer.

    Args:
        streams: number of workers on this node, which share its object store.
        cpus: logical CPUs of a decoding task, which limit the number of concurrent tasks.
        threads: number of the decoder's threads in a task.
    """

    def __init__(self, *, streams: int = 1, cpus: float = 0.5, threads: int = 1) -> None:
        # on the worker's own node: the batches go into its object store
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0, scheduling_strategy=here)(_Stream)
        self._actor: Any = actor.remote(streams, cpus, threads)

    def batches(
        self, rows: Sequence[dict[str, Any]], *, size: int, batch_size: int, name: str
    ) -> Iterator[list[dict[str, Any]]]:
        """Decode rows (`index`, `uri`, `window`) as `decode_sample` does; yield samples in batches.

        The last batch may be smaller.

        Yields:
            Samples of a batch: `index`, `frames`, uint8 (T, size, size, 3), and `error`. The frames
                are read-only views of the object store, and occupy it until they are deleted.
        """
        for blocks in self._blocks(rows, size, batch_size, name):
            yield [_sample(ray.get(block)) for block in blocks]

    def _blocks(
        self, rows: Sequence[dict[str, Any]], size: int, batch_size: int, name: str
    ) -> Iterator[list[ray.ObjectRef]]:
        """Yield the blocks of each batch; meanwhile the next ones are fetched from other nodes."""
        self._actor.begin.remote(rows, size, batch_size, name)
        calls = deque([self._actor.next.remote()])
        coming: deque[list[ray.ObjectRef]] = deque()
        while calls or coming:
            # wait only if there is nothing to yield; otherwise take what is ready
            while calls and (not coming or ray.wait([calls[0]], timeout=0)[0]):
                if blocks := ray.get(calls.popleft()):
                    # starts the transfer to this node, and returns at once
                    ray.wait(blocks, num_returns=len(blocks), timeout=0, fetch_local=True)
                    coming.append(blocks)
                    calls.append(self._actor.next.remote())
                if len(coming) == _AHEAD:
                    break
            if coming:
                yield coming.popleft()

    def close(self) -> None:
        """Kill the actor's process."""
        ray.kill(self._actor)


def _sample(block: pa.Table) -> dict[str, Any]:
    """Return the only row of a block, without copying its frames."""
    columns = BlockAccessor.for_block(block).to_numpy()
    return {name: values[0] for name, values in columns.items()}
