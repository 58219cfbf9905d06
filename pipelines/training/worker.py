"""Work of one Ray Train worker: the loop, with Ray, MLflow and the progress board."""

import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.data
import ray.train
import torch
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from ray.train.torch import get_device
from ray.util.metrics import Gauge

from pipelines.core.cluster import quiet_data
from pipelines.core.metric_log import MetricLogger, last_steps
from pipelines.core.models import with_weights_here
from pipelines.core.storage import join, sizes_below, writing_to
from pipelines.core.tracking import Run
from pipelines.data.batches import Batch, stream_batches
from pipelines.data.feature_stream import feature_stream
from pipelines.data.streaming import FrameStream
from pipelines.training.retention import (
    checkpoints,
    fetched,
    make_room,
    remove_partial,
    remove_surplus,
)
from pipelines.training.trainer import Task, Trainer
from pipelines.training.validation import gather
from re2tal.errors import UserError
from re2tal.memory.live import MEGABYTE
from re2tal.reversible import ReversibleError
from re2tal.videos.windows import Window

# Metric of a step: its gauge, description, and factor from its unit to Prometheus' base unit.
_GAUGES = (
    ("train/frames_per_second", "frames_per_second", "Frames a second that a worker trains on.", 1),
    ("train/data_wait_share", "data_wait_share", "Share of the time spent waiting for frames.", 1),
    ("train/loss", "loss", "Loss of the last step, over all workers.", 1),
    ("memory/cuda_peak_mb", "cuda_peak_bytes", "Peak of PyTorch's GPU memory, step.", MEGABYTE),
    ("memory/rss_peak_mb", "rss_peak_bytes", "Peak of a worker's host memory, step.", MEGABYTE),
)
PREFIX = "re2tal_"
"""Prefix of the gauges' names; Ray puts `ray_` in front of it."""


class Gauges:
    """Prometheus gauges of one worker.

    Args:
        run_id: id of the MLflow run.
        rank: rank of the worker.
        world_size: number of workers, by which the speed of all workers together is divided.
    """

    def __init__(self, *, run_id: str, rank: int, world_size: int) -> None:
        tags = {"run": run_id, "rank": str(rank)}
        self._world_size = world_size
        self._gauges: dict[str, tuple[Gauge, float]] = {}
        for metric, name, description, unit in _GAUGES:
            gauge = Gauge(f"{PREFIX}{name}", description=description, tag_keys=tuple(tags))
            gauge.set_default_tags(tags)
            self._gauges[metric] = (gauge, unit)

    def set(self, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step, by the names that the training loop logs."""
        for name, value in metrics.items():
            if name in self._gauges:
                gauge, unit = self._gauges[name]
                share = self._world_size if name == "train/frames_per_second" else 1
                gauge.set(value * unit / share)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Work that the driver hands to every worker.

    Attributes:
        task: task whose recipe has absolute paths.
        run: MLflow run that receives the metrics.
        output: folder of this run for files beside the checkpoints; absolute path or URI.
        board: handle of the progress actor.
        threads: number of PyTorch's threads, if other runs share the node; None divides its cores
            among the workers of this run.
    """

    task: Task
    run: Run
    output: str
    board: Any
    threads: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingProblem:
    """Problem that a new attempt of a worker or an evaluation would meet again.

    It is returned, not raised: after an exception Ray prints the worker's stack and tries again.
    """

    message: str


class WindowSource:
    """Windows of a run, decoded with Ray Data, or read from its features.

    Args:
        task: task of the run.
        rank: rank of the worker, under which Ray's dashboard lists the work.
        streams: number of workers and evaluations on this node, which share its object store.
    """

    def __init__(self, task: Task, *, rank: int, streams: int) -> None:
        self._task, self._rank = task, rank
        self._features = feature_stream(task.plan)
        if self._features is None:
            scale = task.recipe.scale
            self._frames = FrameStream(
                streams=streams, cpus=scale.cpus_per_decoder, threads=scale.decoder_threads
            )

    def stream(self, windows: Sequence[Window], *, size: int, name: str) -> Iterator[Batch]:
        """Decode windows with Ray Data, or read their features, in batches, in order."""
        task = self._task
        if self._features is not None:
            return self._features.batches(windows, batch_size=task.recipe.batch_size)
        return stream_batches(
            self._frames,
            windows,
            task.plan.uris,
            size=size,
            batch_size=task.recipe.batch_size,
            name=f"{name}, worker {self._rank}",
        )

    def close(self) -> None:
        """End the process of the decoding, if there is one."""
        if self._features is None:
            self._frames.close()


class Upload:
    """Upload of a checkpoint to the folder of the run, called in a thread of Ray Train.

    The training goes on meanwhile. Only one upload is under way at a time, because each removes
    incomplete and surplus checkpoints, and must not remove another's.

    Args:
        job: work that the checkpoint belongs to.
        storage: Ray Train's storage of the run.
        checkpoint: folder of the checkpoint, which is moved into a folder of this upload.

    Attributes:
        ended: set once the checkpoint is kept, or cannot be.
        problem: sentence that says why it cannot be; empty if it is kept.
    """

    def __init__(self, job: Job, storage: Any, checkpoint: Path) -> None:
        self._job, self._storage = job, storage
        self._scratch = tempfile.TemporaryDirectory()
        self.folder = Path(shutil.move(checkpoint, self._scratch.name))
        self.ended, self.problem = threading.Event(), ""

    def __call__(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Copy the checkpoint, and remove those that are not kept any more.

        Raises:
            OSError: the storage failed. Ray Train tries some of these errors again, and ends the
                attempt with the others.
        """
        job, output = self._job, self._job.output
        wanted = sum(sizes_below(str(self.folder)).values())
        try:
            with writing_to(output, what="a checkpoint"):
                make_room(output, name, wanted)
                try:
                    self._storage.persist_current_checkpoint(checkpoint, name)
                except OSError:
                    remove_partial(output)
                    raise
                remove_surplus(output, job.task.recipe.checkpoints, job.task.score, written=name)
        except UserError as problem:
            # `settle` raises it in the loop; an exception here would make Ray Train try again
            self.problem = str(problem)
        self._scratch.cleanup()
        self.ended.set()
        place = self._storage.build_checkpoint_path_from_name(name)
        return ray.train.Checkpoint(place, self._storage.storage_filesystem)


class RayRuntime:
    """`Runtime` with data from Ray Data and results for Ray Train and MLflow."""

    def __init__(self, job: Job, metrics: MetricLogger | None) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = get_device()
        self._job = job
        self._metrics = metrics
        self._logged = _logged(job) if metrics is not None else {}
        self._gauges = Gauges(run_id=job.run.run_id, rank=self.rank, world_size=self.world_size)
        self._leaving: frozenset[str] = frozenset()
        self._storage = context.get_storage()
        self._upload: Upload | None = None  # the last one, on rank 0
        self._unsettled = False  # the same on every rank
        beside = job.task.recipe.scale.validation_workers
        self.evaluates = not beside
        streams = context.get_local_world_size() + beside
        self.stream = WindowSource(job.task, rank=self.rank, streams=streams).stream

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Queue metrics for MLflow, on rank 0; every rank shows its own as gauges.

        Steps that were logged before the run lost a process are taken again, with the same values,
        but not logged again.
        """
        self._gauges.set(metrics)
        if self._metrics is not None:
            new = {k: value for k, value in metrics.items() if step > self._logged.get(k, -1)}
            self._metrics.log(new, step=step)

    def say(self, line: str) -> None:
        """Post a line of progress, on rank 0."""
        if self.rank == 0:
            self._job.board.post.remote(line)

    def report(self, metrics: Mapping[str, float], checkpoint: Path) -> None:
        """Hand a checkpoint over to Ray Train, which uploads it while the training goes on.

        Every rank calls it. It waits for the checkpoint before.

        Raises:
            UserError: if the one before could not be kept, because there is no room for it or the
                folder of the run cannot be written to.
        """
        if self._metrics is not None:
            self._metrics.flush()
        self.settle()
        whole = None
        if self.rank == 0:
            self._upload = Upload(self._job, self._storage, checkpoint)
            whole = ray.train.Checkpoint.from_directory(self._upload.folder)
        self._unsettled = True
        ray.train.report(
            dict(metrics),
            checkpoint=whole,
            checkpoint_dir_name=checkpoint.name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,  # `Upload` has removed it by then
            checkpoint_upload_fn=self._upload,
        )

    def settle(self, *, wait: bool = True) -> None:
        """Wait for the upload of the last checkpoint, if it is under way; every rank calls it.

        Args:
            wait: false to go on if it has not ended.

        Raises:
            UserError: if it could not be kept; raised on all ranks.
        """
        if not self._unsettled:
            return
        upload = self._upload
        if upload is not None and wait and not upload.ended.is_set():
            self.say(f"waiting for the upload of {upload.folder.name}")
            upload.ended.wait()
        # rank 0 alone has an upload, so it decides for all whether it has ended
        ended = upload is not None and upload.ended.is_set()
        ended, problem = gather((ended, upload.problem if upload and ended else ""))[0]
        self._unsettled = not ended
        if problem:
            raise UserError(problem)

    def preempted(self) -> bool:
        """Return true, on every rank, if Ray has announced a node's end since the last call."""
        self.settle(wait=False)  # a run whose checkpoints cannot be kept is to end early
        if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") == "0":
            return False
        info = ray.train.get_preemption_info()
        nodes = frozenset(info.preempted_node_to_ranks) if info else frozenset()
        new, self._leaving = nodes - self._leaving, self._leaving | nodes
        return bool(new)

    def checkpoints(self) -> Sequence[AbstractContextManager[Path]]:
        """List the run's checkpoints as rank 0 finds them, the newest first.

        Ray Train's record of the newest one is not used: a worker that was lost may have written
        one that Ray Train does not know.
        """
        kept, partial = gather(checkpoints(self._job.output) if self.rank == 0 else None)[0]
        for problem in partial.values():
            self.say(f"warning: {problem} It is removed when the next one is written.")
        return [fetched(one.uri) for one in reversed(kept)]


def _logged(job: Job) -> dict[str, int]:
    """Return the last logged step of each metric; none if MLflow does not answer."""
    try:
        return last_steps(job.run)
    except (MlflowException, OSError) as error:
        job.board.post.remote(
            f"warning: MLflow does not say which steps are logged; some may appear twice ({error})"
        )
        return {}


def _train(job: Job, task: Task, runtime: RayRuntime) -> dict[str, float] | TrainingProblem:
    weights = task.recipe.model.weights
    try:
        return Trainer(task, runtime, weights=weights, output=job.output).run()
    except (UserError, ReversibleError) as problem:
        return TrainingProblem(message=str(problem))


def train(job: Job) -> dict[str, float] | TrainingProblem:
    """Train one worker's share of a run; rank 0 also writes metrics to MLflow.

    Returns:
        The metrics of the last epoch, or the problem that stopped all workers alike.
    """
    quiet_data()
    context = ray.train.get_context()
    # Ray gives every worker all cores; without a limit their threads would compete for them
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(job.threads or max(1, cores // context.get_local_world_size()))
    with tempfile.TemporaryDirectory() as folder:
        recipe = with_weights_here(job.task.recipe, Path(folder), tracking_uri=job.run.uri)
        logged = metrics_sent(job) if context.get_world_rank() == 0 else nullcontext()
        with _node_watched(job), logged as metrics:
            task = replace(job.task, recipe=recipe)  # type: ignore[type-var]
            return _train(job, task, RayRuntime(job, metrics))


@contextmanager
def _node_watched(job: Job) -> Iterator[None]:
    """Log the memory, GPUs and load of a node from one of the run's workers on it.

    The metrics' names contain the node's name if the run may have several nodes.
    """
    context = ray.train.get_context()
    if context.get_local_rank() > 0:
        yield
        return
    several = job.task.recipe.scale.workers > context.get_local_world_size()
    monitor = SystemMetricsMonitor(
        job.run.run_id,
        node_id=socket.gethostname() if several else None,
        resume_logging=True,
        tracking_uri=job.run.uri,
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


@contextmanager
def metrics_sent(job: Job) -> Iterator[MetricLogger]:
    """Send metrics of the run, and warn if some could not be sent."""
    unsent_file = join(job.output, f"unsent_metrics_{time.time():.0f}.jsonl")
    metrics = MetricLogger(job.run, fallback=unsent_file)
    try:
        yield metrics
    finally:
        try:
            unsent = metrics.close()
        except OSError as error:  # such as a full disk; the training's own outcome matters more
            job.board.post.remote(f"warning: metrics could be neither sent nor kept ({error})")
        else:
            if unsent:
                job.board.post.remote(
                    f"warning: {unsent} metrics could not be sent to MLflow: see {unsent_file}"
                )
