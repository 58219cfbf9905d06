"""The training loop of one worker.

It knows PyTorch and DDP, not Ray: a `Runtime` gives it data and takes results.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from pipelines.checkpoints import TrainingState, complete
from pipelines.clock import Clock, duration
from pipelines.compiling import compile_parts
from pipelines.data import Batch, share
from pipelines.freezing import train_mode
from pipelines.metric_names import UNSCORED
from pipelines.optim import build_average, build_optimizer, build_schedule, fast_forward
from pipelines.plan import all_failures
from pipelines.sharding import shard
from pipelines.step import Stepper, in_passes, seed_step
from pipelines.task import Task
from pipelines.validation import gather
from re2tal.detector import Detector
from re2tal.reversible import check, reconstruction_errors, stage_modes
from re2tal.videos.augmentation import augment, clip_seed
from re2tal.videos.windows import Window

PREEMPTION_STEPS = 10  # steps between looks at whether a node is going to be taken away


class Runtime(Protocol):
    """What surrounds a worker."""

    rank: int
    world_size: int
    device: torch.device

    def stream(self, windows: Sequence[Window], *, size: int) -> Iterator[Batch]:
        """Decodes windows, `size` pixels square, and yields them in batches, in order."""

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Appends metrics to the run; only rank 0's are kept."""

    def say(self, line: str) -> None:
        """Shows a line of progress; only rank 0's is shown."""

    def report(self, metrics: Mapping[str, float], checkpoint: Path) -> None:
        """Hands over metrics and a checkpoint folder (rank 0's); every rank calls it."""

    def preempted(self) -> bool:
        """Whether a node is known to be taken away soon, once for each; every rank calls it."""

    def restored(self) -> AbstractContextManager[Path | None]:
        """Gives the checkpoint to go on from, if there is one."""


class Trainer:
    """One worker's share of a run: epochs of steps, each ended by validation and a checkpoint."""

    def __init__(
        self, task: Task, runtime: Runtime, *, weights: str | Path | None, output: str
    ) -> None:
        self.task, self.recipe, self.runtime = task, task.recipe, runtime
        torch.manual_seed(task.recipe.seed)  # the same weights on every rank
        detector = task.build(weights).to(runtime.device)
        self.stride: int = detector.backbone.temporal_stride
        self.state = self._begin(detector, task.build(weights) if self._sharded else None)
        with runtime.restored() as folder:
            if folder is not None:
                self._restore(folder)
        compile_parts(detector, self.recipe.optim.compile)
        self.step = Stepper(
            self._wrapped(detector),
            self.state,
            self.recipe.optim,
            augment=self._augmented,
            device=runtime.device,
            output=output,
        )

    @property
    def _sharded(self) -> bool:
        return self.recipe.scale.sharded and dist.is_initialized()

    def _wrapped(self, detector: Detector) -> nn.Module:
        """The detector as each worker calls it to have the gradients of all."""
        if self._sharded or not dist.is_initialized():
            return detector
        return DistributedDataParallel(detector)

    @property
    def windows_per_step(self) -> int:
        """Windows that all workers together see in a step."""
        return self._windows_per_worker * self.runtime.world_size

    @property
    def _windows_per_worker(self) -> int:
        return self.recipe.batch_size * self._passes

    @property
    def _passes(self) -> int:
        """Of a worker in a step: as long as some are missing, the others do their work too."""
        scale, accumulation = self.recipe.scale, self.recipe.optim.accumulation
        return max(1, accumulation * scale.workers // self.runtime.world_size)

    def _begin(self, detector: Detector, whole: Detector | None) -> TrainingState:
        optim, device = self.recipe.optim, self.runtime.device
        average = build_average(detector, optim)
        if whole is not None:
            whole.to(device)
            for module in (detector, average.module):
                shard(module, device=device, workers=self.runtime.world_size)
        optimizer = build_optimizer(detector, optim)
        return TrainingState(
            detector=detector,
            average=average,
            whole=whole,
            optimizer=optimizer,
            schedule=build_schedule(
                optimizer, optim, steps_per_epoch=self._steps, epochs=self.recipe.epochs
            ),
            scaler=GradScaler(device.type, enabled=optim.precision == "float16"),
            world_size=self.runtime.world_size,
        )

    def _restore(self, folder: Path) -> None:
        state, epochs = self.state, self.recipe.epochs
        state.load(folder)
        workers = ""
        if state.world_size != self.runtime.world_size:
            workers = f", with {self.runtime.world_size} workers instead of {state.world_size}"
            steps = self._steps
            state.schedule = fast_forward(
                state.optimizer,
                self.recipe.optim,
                steps_per_epoch=steps,
                epochs=epochs,
                done=state.epoch * steps + state.windows // self.windows_per_step,
            )
            state.world_size = self.runtime.world_size
        into = f" and {state.windows} windows of the next" if state.windows else ""
        self.runtime.say(f"going on after epoch {state.epoch} of {epochs}{into}{workers}")

    @cached_property
    def _steps(self) -> int:
        """Steps of an epoch; to count them, all windows of one are cut."""
        return len(self._windows(0)) // self._windows_per_worker

    def _windows(self, epoch: int, *, behind: int = 0) -> list[Window]:
        """This worker's windows of an epoch, after the first `behind` of all workers'."""
        windows = self.task.windows(stride=self.stride, epoch=epoch)[behind:]
        if behind and len(windows) < self.windows_per_step:
            return []  # with more workers than before, what was left may not fill a step
        return share(
            windows,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            batch_size=self._windows_per_worker,
        )

    def run(self) -> dict[str, float]:
        """Trains to the recipe's last epoch.

        Returns:
            The metrics of the last epoch.

        Raises:
            NonFiniteLossError: if a loss is not finite.
            UnusableVideosError: if too many videos cannot be decoded.
        """
        metrics: dict[str, float] = {}
        while self.state.epoch < self.recipe.epochs:
            self._train_epoch()
            self.state.epoch += 1
            self.state.windows = 0
            check(self.state.detector)  # before what cannot be taken back: a checkpoint
            if self.state.epoch < self.recipe.evaluate_from:
                data = self.recipe.data
                all_failures(self.task.plan, gather(self.state.failures), data.max_failed)
                self._checkpoint({self.task.score: UNSCORED})
                continue
            evaluation = self.task.evaluate(self.state, self.runtime, steps=self._steps)
            metrics = evaluation.metrics
            seen = metrics | _reversible_metrics(self.state.detector)
            self.runtime.log(seen, step=self.state.step)
            self._checkpoint(metrics, evaluation.write if self.runtime.rank == 0 else None)
        return metrics

    def _checkpoint(
        self, metrics: Mapping[str, float], add: Callable[[Path], object] | None = None
    ) -> None:
        """Hands over a checkpoint, with what is added to its folder."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "checkpoint"
            folder.mkdir()
            self.state.save(folder, self.task.spec, write=self.runtime.rank == 0)
            if add is not None:
                add(folder)
            complete(folder)
            self.runtime.report({**metrics, "epoch": self.state.epoch}, folder)

    def _train_epoch(self) -> None:
        state, recipe = self.state, self.recipe
        windows = self._windows(state.epoch, behind=state.windows)
        steps, first = self._steps, state.windows // self.windows_per_step
        size = recipe.data.augmentation.decoded_size(recipe.data.size)
        clock = Clock()
        train_mode(state.detector, recipe.model)
        batches = clock.timed(self.runtime.stream(windows, size=size))
        for passes in in_passes(batches, self._passes):
            for batch in passes:
                state.failures |= batch.failures
            seed_step(recipe.seed, step=state.step, rank=self.runtime.rank)
            index = state.windows // self.windows_per_step
            moved = self.task.before_step(state, done=state.epoch * steps + index, steps=steps)
            metrics = self.step(passes) | clock.metrics(self.runtime.world_size) | moved
            self.runtime.log(metrics, step=state.step)
            state.windows += self.windows_per_step
            index += 1
            if (index - 1) % max(1, steps // 5) == 0 or index == steps:
                self._say_progress(index, steps, metrics, clock, taken=index - first)
            if index < steps and self._checkpoint_due():
                self._checkpoint({self.task.score: UNSCORED})
                self.runtime.say(f"checkpoint after step {index} of {steps}")

    def _checkpoint_due(self) -> bool:
        every = self.recipe.checkpoints.steps
        due = every is not None and self.state.step % every == 0
        if self.state.step % PREEMPTION_STEPS == 0 and self.runtime.preempted():
            self.runtime.say("a node is going to be taken away: writing a checkpoint")
            return True
        return due

    def _augmented(self, batch: Batch) -> Tensor:
        """The frames of a training batch on the device, as the network is to see them."""
        if batch.frames.is_floating_point():  # features
            return batch.frames.to(self.runtime.device, non_blocking=True)
        data, seed, epoch = self.recipe.data, self.recipe.seed, self.state.epoch
        return augment(
            batch.frames.to(self.runtime.device, non_blocking=True),
            data.augmentation,
            size=data.size,
            seeds=[clip_seed(window, seed=seed, epoch=epoch) for window in batch.windows],
        )

    def _say_progress(
        self, index: int, steps: int, metrics: Mapping[str, float], clock: Clock, *, taken: int
    ) -> None:
        to_come = steps * (self.recipe.epochs - self.state.epoch) - index
        left = clock.elapsed / taken * to_come
        self.runtime.say(
            f"epoch {self.state.epoch + 1}/{self.recipe.epochs}  step {index:>3}/{steps}  "
            f"loss {metrics['train/loss']:.3f}  {metrics['train/frames_per_second']:.0f} frames/s  "
            f"waiting for data {metrics['train/data_wait_share']:.0%}  left {duration(left)}"
        )


def _reversible_metrics(detector: nn.Module) -> dict[str, float]:
    """How well the stages rebuild their activations, and how many have to store them instead."""
    modes, errors = stage_modes(detector), reconstruction_errors(detector)
    # MLflow takes letters, digits and a few signs for a metric's name.
    metrics = {f"reversible/error/{name.replace('…', '-')}": e for name, e in errors.items()}
    if modes:
        stored = sum(mode != "reversible" for mode in modes.values())
        metrics["reversible/stages_stored"] = float(stored)
    return metrics
