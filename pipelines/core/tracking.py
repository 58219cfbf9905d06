"""MLflow: one run a training run, written in batches and never in the way of a step.

The driver opens the store and makes the run (a new data base that several processes open at once is
corrupted); rank 0 only appends metrics, through a client of its own.
"""

import dataclasses
import json
import logging
import os
import platform
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, ErrorCode
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_GIT_COMMIT, MLFLOW_RUN_NAME
from pydantic import TypeAdapter, ValidationError

from pipelines.config.recipe import Recipe
from pipelines.core.storage import fetch, replacing
from re2tal.errors import UserError


def git_commit(folder: Path) -> str | None:
    """Returns the commit of the checkout, with `-dirty` if files differ from it; None outside git.

    Args:
        folder: inside the checkout.
    """
    command = [
        "git",
        "-C",
        str(folder),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None


_MAX_METRICS = 1000  # per request; MLflow refuses more
_MAX_PARAMS = 100
_REFUSED = ErrorCode.Name(INVALID_PARAMETER_VALUE)  # of a request that is wrong whenever it is sent
_LOG = logging.getLogger(__name__)


class Tracked(Protocol):
    """A configuration that a run is made of."""

    @property
    def name(self) -> str:
        """What the run is named after."""

    @property
    def experiment(self) -> str:
        """MLflow experiment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Names a run for whoever writes to it; plain strings, so it travels to any process.

    Attributes:
        uri: tracking URI.
        run_id: of the MLflow run.
    """

    uri: str
    run_id: str

    @property
    def client(self) -> MlflowClient:
        """A client of its store."""
        return MlflowClient(self.uri)


def tracking_uri(output: str | Path) -> str:
    """Where runs go: the server in `MLFLOW_TRACKING_URI`, else one SQLite file in `output`.

    Args:
        output: folder of the default store, absolute.

    Raises:
        UserError: if there is no server, and `output` is the URI of an object store, which cannot
            hold a data base.
    """
    if server := os.environ.get("MLFLOW_TRACKING_URI"):
        return server
    if "://" in str(output):
        raise UserError(
            f"{output} can hold checkpoints, but not MLflow's data base: name a tracking server in "
            "the environment variable MLFLOW_TRACKING_URI, or a local folder."
        )
    return f"sqlite:///{output}/mlflow.db"


def _experiment_id(client: MlflowClient, uri: str, name: str, output: str | Path) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    local = uri.startswith("sqlite:///") and "://" not in str(output)
    return client.create_experiment(
        name, artifact_location=(Path(output) / "artifacts").as_uri() if local else None
    )


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a nested dataclass by dotted name: `("optim.clip", 1.0)`.

    Args:
        config: the dataclass.
        prefix: put before each name.
    """
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        name = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            if type(value) is not item.type:  # one of several: a backbone, a localizer
                yield name, type(value).__name__
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def _tags(recipe_name: str) -> list[RunTag]:
    packages = ("torch", "torchvision", "ray", "mlflow", "av")
    tags = {MLFLOW_RUN_NAME: f"{recipe_name}-{time.strftime('%Y%m%d-%H%M%S')}"}
    tags |= {f"version.{name}": version(name) for name in packages}
    tags["version.python"] = platform.python_version()
    commit = git_commit(Path(__file__).parent)
    if commit is not None:
        tags[MLFLOW_GIT_COMMIT] = commit
    return [RunTag(key, value) for key, value in tags.items()]


def open_store(experiment: str, *, output: str | Path) -> tuple[MlflowClient, str, str]:
    """Opens the store, and makes it and the experiment if need be.

    Args:
        experiment: its name.
        output: folder of the default store; it is made. A URI, if a server is set.

    Returns:
        A client, the tracking URI and the experiment's id.

    Raises:
        MlflowException: if the store cannot be reached.
        UserError: as `tracking_uri`.
    """
    if "://" not in str(output):
        Path(output).mkdir(parents=True, exist_ok=True)
    for name in ("alembic", "mlflow.store.db.utils"):  # each table that a new store gets
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(output)
    client = MlflowClient(uri)
    return client, uri, _experiment_id(client, uri, experiment, output)


def start_run(recipe: Tracked, *, output: str | Path, tags: Mapping[str, str] | None = None) -> Run:
    """Opens the store, makes it if need be, and starts a run with the whole configuration.

    Args:
        recipe: the configuration, a dataclass.
        output: folder of the default store; it is made.
        tags: of the run, beside those that every run has.

    Raises:
        MlflowException: if the store cannot be reached.
    """
    client, uri, experiment = open_store(recipe.experiment, output=output)
    run = client.create_run(experiment)
    run_id = run.info.run_id
    params = [Param(name, str(value)) for name, value in flatten(recipe)]
    for start in range(0, len(params), _MAX_PARAMS):
        client.log_batch(run_id, params=params[start : start + _MAX_PARAMS])
    extra = [RunTag(key, value) for key, value in (tags or {}).items()]
    client.log_batch(run_id, tags=[*_tags(recipe.name), *extra])
    return Run(uri=uri, run_id=run_id)


def log_dataset(run: Run, *, name: str, source: str, digest: str) -> None:
    """Records which data a run used.

    Args:
        run: the run.
        name: of the data set.
        source: where its annotations are.
        digest: fingerprint of the annotations.
    """
    dataset = Dataset(
        name=name,
        digest=digest[:36],  # as much as the store keeps
        source_type="http" if "://" in source else "local",
        source=json.dumps({"uri": source}),
    )
    tag = InputTag(key=MLFLOW_DATASET_CONTEXT, value="training")
    run.client.log_inputs(run.run_id, [DatasetInput(dataset, [tag])])
    run.client.set_tag(run.run_id, "data.fingerprint", digest)


def log_text(run: Run, lines: Sequence[str], name: str) -> None:
    """Writes an artifact of lines; none at all when there are no lines.

    Args:
        run: the run.
        lines: the content.
        name: path among the run's artifacts.
    """
    if lines:
        run.client.log_text(run.run_id, "\n".join(lines) + "\n", name)


def log_metrics(run: Run, metrics: Mapping[str, float], *, step: int) -> None:
    """Writes a few metrics at once and waits for it; in the loop use a `MetricLogger`.

    Args:
        run: the run.
        metrics: name to value.
        step: global step.
    """
    now = int(time.time() * 1000)
    entries = [Metric(name, float(value), now, step) for name, value in metrics.items()]
    run.client.log_batch(run.run_id, metrics=entries)


@contextmanager
def finishing(run: Run) -> Iterator[None]:
    """Ends a run as its block ends: FINISHED, KILLED (interrupted), FAILED with the error's text.

    Args:
        run: a started run.
    """
    try:
        yield
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        run.client.set_tag(run.run_id, "error", f"{type(error).__name__}: {error}"[:5000])
        run.client.set_terminated(run.run_id, status)
        raise
    run.client.set_terminated(run.run_id, "FINISHED")


class MetricLogger:
    """Appends metrics to a run from a thread of its own; a step never waits for the store.

    A store that does not answer loses nothing: what could not be sent stays queued, and what is
    left at the end is written to `fallback`. So are metrics that the store refuses, such as those
    with characters in their names that it does not allow; they keep no other from being sent.
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
        """Queues metrics; returns at once.

        Args:
            metrics: name to value; names with the characters that MLflow allows (`safe_names`).
            step: global step.
        """
        now = int(time.time() * 1000)
        for name, value in metrics.items():
            self._queue.put(Metric(name, float(value), now, step))

    def _send(self) -> bool:
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
                # One wrong metric has the whole request refused: ever smaller ones find it.
                size = len(batch) // 2
                if size:
                    continue
                self._refuse(batch[0], str(error))
            del self._pending[: len(batch)]
            size = min(max(1, 2 * size), _MAX_METRICS)
        return True

    def _refuse(self, metric: Metric, reason: str) -> None:
        if metric.key not in {other.key for other in self._refused}:
            _LOG.warning("MLflow refuses the metric %r: %s", metric.key, reason)
        self._refused.append(metric)

    def flush(self, *, timeout: float = 10.0) -> None:
        """Has what was logged so far sent before it returns, if the store answers in time.

        What a checkpoint is past is not trained again, so that its metrics should not be lost with
        the process.

        Args:
            timeout: seconds.
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
        """Sends what is left.

        Returns:
            How many metrics could not be sent, or were refused; they are in the fallback file, a
            JSON object a line.
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


FILE = "recipe.json"
_RECIPE = TypeAdapter(Recipe)


def log_recipe(run: Run, recipe: Recipe) -> None:
    """Writes a run's configuration to its artifacts.

    Args:
        run: the run.
        recipe: its configuration.
    """
    run.client.log_text(run.run_id, _RECIPE.dump_json(recipe, indent=2).decode(), FILE)


# Fields of recipes that earlier versions wrote, which changed no result.
_DROPPED = {"optim.compile"}


def recipe_of(run: Run) -> Recipe:
    """Reads the configuration of a run of `train.py`, or of a trial of a sweep.

    Args:
        run: in a store that exists.

    Raises:
        UserError: if there is no such run, it was another script's, or its configuration has fields
            that this version does not have.
    """
    with tempfile.TemporaryDirectory() as folder:
        uri = f"runs:/{run.run_id}/{FILE}"
        path = fetch(uri, Path(folder), tracking_uri=run.uri, what="The run's configuration")
        content = path.read_bytes()
    try:
        recipe = _RECIPE.validate_json(content)
    except ValidationError as error:
        raise UserError(f"{uri} is not a recipe of this version of re2tal: {error}") from error
    known = _names(json.loads(_RECIPE.dump_json(recipe))) | _DROPPED
    unknown = _names(json.loads(content)) - known
    if unknown:
        raise UserError(
            f"{uri} is not a recipe of this version of re2tal, which has no "
            f"{', '.join(sorted(unknown))}: train with the version that made it."
        )
    return recipe


def _names(value: Any, prefix: str = "") -> set[str]:
    """The dotted names of all fields in nested objects."""
    if not isinstance(value, dict):
        return {prefix}
    return {
        name
        for key, inner in value.items()
        for name in _names(inner, f"{prefix}.{key}" if prefix else key)
    }
