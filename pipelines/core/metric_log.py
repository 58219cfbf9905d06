"""Metrics of a run in MLflow: written at once, or by a thread without blocking a step."""

import json
import logging
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core.storage import replacing
from pipelines.core.tracking import Run

if TYPE_CHECKING:
    from mlflow.entities import Metric

_MAX_METRICS = 1000  # MLflow's limit per request
_REFUSED = "INVALID_PARAMETER_VALUE"  # error code of a wrong request: sending it again is useless
_LOG = logging.getLogger(__name__)


def last_steps(run: Run) -> dict[str, int]:
    """Return the last logged step of each metric of a run, by the metric's name."""
    # MLflow's entity has only the values; its protobuf message has the steps too
    found = run.client.get_run(run.run_id).data.to_proto().metrics
    return {metric.key: metric.step for metric in found}


def log_metrics(run: Run, metrics: Mapping[str, float], *, step: int, again: bool = True) -> None:
    """Write metrics and wait for the store; training loops use a `MetricLogger` instead.

    With `again` false, metrics that the run has at this step or a later one are left out.
    """
    from mlflow.entities import Metric

    there = {} if again else last_steps(run)
    now = int(time.time() * 1000)
    entries = [
        Metric(name, float(value), now, step)
        for name, value in metrics.items()
        if step > there.get(name, -1)
    ]
    run.client.log_batch(run.run_id, metrics=entries)


class MetricLogger:
    """Thread that appends metrics to a run, so that no step waits for the store.

    No metric is lost while the store does not answer: unsent metrics stay queued, and those left at
    the end are written to `fallback`. Metrics that the store refuses, for example because of a
    character in their name, are written there too; all others are sent.
    """

    def __init__(self, run: Run, *, fallback: str | Path, interval: float = 2.0) -> None:
        self._run = run
        self._fallback = fallback
        self._interval = interval
        self._queue: queue.SimpleQueue[Metric] = queue.SimpleQueue()
        self._waiting: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._pending: list[Metric] = []
        self._refused: list[Metric] = []
        self._thread.start()

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Queue metrics and return at once; MLflow must accept their names (see `safe_names`)."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for name, value in metrics.items():
            self._queue.put(Metric(name, float(value), now, step))

    def _send(self) -> bool:
        from mlflow.exceptions import MlflowException

        while not self._queue.empty():
            self._pending.append(self._queue.get())
        size = _MAX_METRICS
        while self._pending:
            batch = self._pending[:size]
            try:
                self._run.client.log_batch(self._run.run_id, metrics=batch)
            except (MlflowException, OSError) as error:
                if getattr(error, "error_code", None) != _REFUSED:
                    return False  # still in _pending: the next round, or close(), sends them
                # One wrong metric causes the whole request to be refused: halve until it is found.
                size = len(batch) // 2
                if size:
                    continue
                self._refuse(batch[0], str(error))
            del self._pending[: len(batch)]
            size = min(max(1, 2 * size), _MAX_METRICS)
        return True

    def _refuse(self, metric: "Metric", reason: str) -> None:
        if metric.key not in {other.key for other in self._refused}:
            _LOG.warning("MLflow refuses the metric %r: %s", metric.key, reason)
        self._refused.append(metric)

    def flush(self, *, timeout: float = 10.0) -> None:
        """Send all metrics logged so far, and wait up to `timeout` seconds.

        Steps before a checkpoint are never repeated, so their metrics must not be lost if the
        process dies.
        """
        through = threading.Event()
        self._waiting.put(through)
        self._wake.set()
        through.wait(timeout)

    def _loop(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._interval)
            self._wake.clear()
            waiting = []
            while not self._waiting.empty():
                waiting.append(self._waiting.get())
            self._send()
            for through in waiting:
                through.set()

    def close(self) -> int:
        """Send the metrics that are left.

        Returns:
            Number of metrics that were refused or could not be sent; they are in the fallback file,
            one JSON object a line.
        """
        self._stop.set()
        self._wake.set()
        self._thread.join()
        self._send()
        unsent = [*self._refused, *self._pending]
        if unsent:
            lines = "".join(json.dumps(dict(metric)) + "\n" for metric in unsent)
            with replacing(str(self._fallback)) as stream:
                stream.write(lines.encode())
        return len(unsent)
