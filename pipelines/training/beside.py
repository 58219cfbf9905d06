"""Evaluation of a run's checkpoints beside its training, in Ray tasks with their own resources.

Ray Train's `ValidationConfig` is not used: it evaluates one checkpoint at a time, only logs
failures, and its metrics reach neither callbacks nor Ray Tune.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
import torch
from mlflow.exceptions import MlflowException
from ray.exceptions import RayError, RayTaskError
from safetensors.torch import load_file

from pipelines.config.recipe import Recipe
from pipelines.core.cluster import quiet_data
from pipelines.core.metric_names import EPOCH
from pipelines.core.resources import evaluations_at_a_time
from pipelines.core.storage import join, replacing, walk_files, writing_to
from pipelines.training.checkpoints import (
    COMPLETE_FILE,
    DETECTOR_FOLDER,
    DamagedCheckpointError,
    Listing,
    Waiting,
    facts_below,
    listing_bytes,
    read_listing,
)
from pipelines.training.retention import checkpoints, fetched
from pipelines.training.trainer import Evaluation, EvaluationRuntime, Task
from pipelines.training.worker import Job, TrainingProblem, WindowSource, metrics_sent
from re2tal.detector import Detector
from re2tal.errors import UserError, count_of
from re2tal.localizers.losses import divide_alike
from re2tal.trained import WEIGHTS_FILE

_LOOK_SECONDS = 2.0  # between two looks at the run's folder


@dataclass(kw_only=True, slots=True)
class _State:
    """Detector of a checkpoint, as the `pipelines.training.trainer.Evaluated` of a task."""

    detector: Detector[Any, Any]
    epoch: int
    failures: dict[str, str]

    def averaged(self) -> Detector[Any, Any]:
        return self.detector


def evaluate(
    task: Task,
    runtime: EvaluationRuntime,
    checkpoint: Path,
    *,
    epoch: int,
    waiting: Waiting,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Evaluate the detector of a checkpoint as the worker that wrote it would have.

    Args:
        task: task of the run.
        runtime: source of the frames.
        checkpoint: folder of the checkpoint.
        epoch: number of epochs that had ended.
        waiting: further facts of the training.
        device: device of the detector.

    Raises:
        UserError: see `Task.evaluate`.
    """
    torch.set_num_threads(waiting.threads)  # the number of threads decides the order of sums
    torch.manual_seed(task.recipe.seed)
    detector = task.build(None)
    detector.load_state_dict(load_file(checkpoint / DETECTOR_FOLDER / WEIGHTS_FILE))
    divide_alike(detector, waiting.parts)
    state = _State(detector=detector.to(device), epoch=epoch, failures=dict(waiting.failures))
    return task.evaluate(state, runtime, steps=waiting.steps)


class _BesideRuntime:
    """`EvaluationRuntime` of a Ray task that evaluates alone."""

    rank, world_size = 0, 1

    def __init__(self, job: Job) -> None:
        scale = job.task.recipe.scale
        self._board = job.board
        self._source = WindowSource(
            job.task, rank=self.rank, streams=scale.workers + scale.validation_workers
        )
        self.stream, self.close = self._source.stream, self._source.close

    def say(self, line: str) -> None:
        self._board.post.remote(line)


@contextmanager
def _runtime(job: Job) -> Iterator[_BesideRuntime]:
    runtime = _BesideRuntime(job)
    try:
        yield runtime
    finally:
        runtime.close()


def evaluate_waiting(job: Job, uri: str) -> TrainingProblem | str:
    """Evaluate a checkpoint of a run, in a Ray task, and write the result into its folder.

    `complete.json` is replaced last, so that the evaluation of a killed task is started again.

    Args:
        job: work that the checkpoint belongs to.
        uri: path or URI of the checkpoint.

    Returns:
        A problem that ends the run, or the reason why this checkpoint was not evaluated; the reason
        is empty if it was.
    """
    quiet_data()
    task = _without_weights(job.task)
    try:
        listing = read_listing(uri)
        if listing.waiting is None:  # an attempt was lost after it had written the result
            return ""
        with fetched(uri) as local, _runtime(job) as runtime:
            read_listing(local, digests=True)
            evaluation = evaluate(
                task,
                runtime,
                local,
                epoch=int(listing.metrics[EPOCH]),
                waiting=listing.waiting,
                device="cuda" if task.recipe.scale.gpu else "cpu",
            )
        return _keep(job, uri, listing, evaluation)
    except DamagedCheckpointError as problem:
        return str(problem)
    except UserError as problem:
        return TrainingProblem(message=str(problem))


def _without_weights(task: Task) -> Task:
    """Return the task without the localizer's initial weights, whose file is not on this node."""
    recipe = task.recipe
    if isinstance(recipe, Recipe):
        recipe = replace(recipe, model=replace(recipe.model, localizer_weights=None))
    return replace(task, recipe=recipe)  # type: ignore[type-var]


def _keep(job: Job, uri: str, listing: Listing, evaluation: Evaluation) -> str:
    """Write an evaluation's files and metrics into its checkpoint, and log the metrics in MLflow.

    Returns:
        The reason why the evaluation is not kept; empty if it is.
    """
    if read_listing(uri) != listing:
        return f"{uri} was replaced while it was evaluated."
    with tempfile.TemporaryDirectory() as scratch, writing_to(job.output, what="an evaluation"):
        evaluation.write(Path(scratch))
        for name, path in walk_files(scratch).items():
            with replacing(join(uri, name)) as stream:
                stream.write(Path(path).read_bytes())
        files = listing.files | facts_below(Path(scratch))
    with metrics_sent(job) as logger:
        step = int(listing.metrics["step"])
        found = evaluation.metrics | {EPOCH: listing.metrics[EPOCH]}
        logger.log(_not_logged(job, found, step=step), step=step)
    metrics = listing.metrics | evaluation.metrics
    with writing_to(job.output, what="an evaluation"), replacing(join(uri, COMPLETE_FILE)) as file:
        file.write(listing_bytes(Listing(files=files, metrics=metrics)))
    return ""


def _not_logged(job: Job, metrics: Mapping[str, float], *, step: int) -> dict[str, float]:
    """Return those metrics that a lost attempt has not logged at this step."""

    def logged(name: str) -> bool:
        history = job.run.client.get_metric_history(job.run.run_id, name)
        return any(point.step == step for point in history)

    try:
        if not logged(next(iter(metrics))):  # metrics arrive in order: without the first, none did
            return dict(metrics)
        return {name: value for name, value in metrics.items() if not logged(name)}
    except (MlflowException, OSError) as error:
        job.board.post.remote(
            f"warning: MLflow does not say whether this epoch's metrics are logged ({error})"
        )
        return dict(metrics)


class Evaluations:
    """Evaluations of a run's waiting checkpoints, beside the training while the `with` block runs.

    A thread starts an evaluation as soon as a checkpoint waits for it and the cluster has room.

    Args:
        job: work of the run.
        stop: function that ends the training, called if an evaluation fails.

    Raises:
        UserError: if an evaluation failed; raised at the end of the block.
    """

    def __init__(self, job: Job, *, stop: Callable[[], None]) -> None:
        scale = job.task.recipe.scale
        self._job, self._stop_training = job, stop
        self._wanted, self._trained = scale.validation_workers, False
        if (room := self._room()) < self._wanted:
            job.board.post.remote(
                f"{room} of {self._wanted} evaluations at a time fit beside the training"
            )
        self._given = ray.put(job)
        # tried again after a lost process or node, and after any exception, as a worker is
        self._task = ray.remote(evaluate_waiting).options(
            num_cpus=scale.cpus_per_worker,
            num_gpus=1 if scale.gpu else 0,
            max_retries=scale.max_failures,
            retry_exceptions=True,
        )
        self._running: dict[Any, str] = {}  # URIs by Ray's references
        self._left_out: set[str] = set()  # damaged checkpoints, which the training may write again
        self._problem: Exception | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beside, daemon=True)

    def __enter__(self) -> "Evaluations":
        if self._wanted:
            self._thread.start()
        return self

    def _room(self) -> int:
        """Return the number of evaluations that may run at a time just now."""
        if self._trained:  # with 0 too, since an earlier command may have left waiting checkpoints
            return max(1, self._wanted)
        return evaluations_at_a_time(self._job.task.recipe.scale) if self._wanted else 0

    def _beside(self) -> None:
        try:
            while not self._end.wait(_LOOK_SECONDS):
                try:
                    self._advance()
                except FileNotFoundError:
                    continue  # a checkpoint was removed while it was looked at
        except Exception as problem:
            self._problem = problem
            self._stop_training()

    def _advance(self) -> int:
        """Take the results of evaluations that have ended, and start those that have room.

        Returns:
            Number of evaluations that are left.
        """
        for one in [*self._running]:
            if ray.wait([one], timeout=0)[0]:
                self._take(one, self._running.pop(one))
        room = self._room()
        for one in [*self._running][room:]:  # a node was lost: training workers come first
            ray.cancel(one, force=True)
            del self._running[one]
        known = self._left_out.union(self._running.values())
        kept, _ = checkpoints(self._job.output)
        waiting = [one.uri for one in kept if one.waits and one.uri not in known]
        left = len(self._running) + len(waiting)  # damaged ones do not count as left
        for uri in waiting[: room - len(self._running)]:
            self._running[self._task.remote(self._given, uri)] = uri
        return left

    def _take(self, ended: Any, uri: str) -> None:
        try:
            outcome = ray.get(ended)
        except RayTaskError:
            raise
        except RayError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"The evaluation of {uri} was lost too often (--scale.max-failures): {reason} Give "
                "the same command again: it goes on."
            ) from error
        if isinstance(outcome, TrainingProblem):
            raise UserError(outcome.message)
        if outcome:
            self._left_out.add(uri)
            self._job.board.post.remote(f"warning: a checkpoint is not evaluated: {outcome}")

    def finish(self) -> None:
        """Wait after the training until no checkpoint waits for its evaluation."""
        self._halt()
        if self._problem is not None:
            return
        self._trained = True
        self._left_out.clear()
        shown = 0
        while left := self._advance():
            if left != shown:
                shown = left
                print(f"waiting for {count_of(left, 'evaluation')}", flush=True)
            time.sleep(_LOOK_SECONDS / 10)

    def _halt(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._halt()
        for one in self._running:
            ray.cancel(one, force=True)
        if self._problem is not None and (kind is None or issubclass(kind, Exception)):
            raise self._problem from None
