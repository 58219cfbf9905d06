"""Training loop of one worker.

The loop depends on PyTorch and DDP, not on Ray: a `Runtime` provides data and receives results.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from pipelines.config.clip_recipes import AnyRecipe
from pipelines.core.clock import TimeLeft
from pipelines.core.metric_names import EPOCH, UNSCORED
from pipelines.core.storage import writing_to
from pipelines.data.batches import Batch, Clock, share
from pipelines.data.clip_plan import AnyPlan
from pipelines.data.plan import all_failures
from pipelines.training.checkpoints import (
    DamagedCheckpointError,
    TrainingState,
    Waiting,
    complete,
    read_listing,
    shard,
)
from pipelines.training.model import train_mode
from pipelines.training.optimizer import (
    build_average,
    build_optimizer,
    build_schedule,
    fast_forward,
)
from pipelines.training.retention import checkpoint_name
from pipelines.training.stepper import Stepper, in_passes, seed_step
from pipelines.training.validation import gather
from re2tal.detector import Detector
from re2tal.errors import UserError
from re2tal.localizers.losses import loss_parts
from re2tal.reversible import check, reconstruction_errors, stage_modes
from re2tal.trained import DetectorSpec
from re2tal.videos.augmentation import augment, clip_seed
from re2tal.videos.windows import Window


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Result of the evaluation at the end of an epoch.

    Attributes:
        metrics: values for MLflow, by name.
        write: function that writes the evaluation's files into the checkpoint's folder, on rank 0.
    """

    metrics: dict[str, float]
    write: Callable[[Path], None]


class Evaluated(Protocol):
    """Part of a training state that an evaluation needs.

    Attributes:
        epoch: number of finished epochs.
        failures: reason by video id, where windows could not be decoded in the training.
    """

    epoch: int
    failures: dict[str, str]

    def averaged(self) -> Detector[Any, Any]:
        """Return the moving average of the weights as a detector; every worker calls this."""


class Task(Protocol):
    """Goal that a detector is trained for; the driver sends it to the workers."""

    @property
    def score(self) -> str:
        """Metric by which the best checkpoint is chosen."""

    @property
    def recipe(self) -> AnyRecipe:
        """Configuration of the run."""

    @property
    def plan(self) -> AnyPlan:
        """Classes and videos of the run."""

    @property
    def spec(self) -> DetectorSpec:
        """Specification from which the detector is built."""

    def build(self, weights: str | Path | None) -> Any:
        """Build the detector.

        Args:
            weights: file or name of weights for its backbone, or None.

        Raises:
            ValueError: if the weights do not fit.
        """

    def windows(self, *, stride: int, epoch: int) -> list[Window]:
        """List an epoch's windows of all workers, in order, as a function of seed and epoch.

        Args:
            stride: frames per feature of the backbone.
            epoch: number of the epoch, from 0; each has equally many windows.
        """

    def before_step(self, state: TrainingState, *, done: int, steps: int) -> dict[str, float]:
        """Prepare a step; may change the detector as a function of the step.

        Args:
            state: training state of the run.
            done: number of steps before this one, as if the present number of workers had taken all
                of them.
            steps: number of steps of an epoch.

        Returns:
            Metrics of the step.
        """

    def evaluate(self, state: Evaluated, runtime: "EvaluationRuntime", *, steps: int) -> Evaluation:
        """Evaluate the averaged detector of an epoch's end; every rank calls it.

        Args:
            state: training state of the run.
            runtime: source of the frames; it shows progress.
            steps: number of steps of an epoch.

        Raises:
            UserError: if too many videos could not be decoded.
        """


PREEMPTION_STEPS = 10  # steps between checks for a node that is about to be preempted


class EvaluationRuntime(Protocol):
    """Surroundings of an evaluation: its data, and its lines of progress."""

    rank: int
    world_size: int

    def stream(self, windows: Sequence[Window], *, size: int, name: str) -> Iterator[Batch]:
        """Decode windows, `size` pixels square, and yield them in batches, in order.

        Ray's dashboard lists the work under the name.
        """

    def say(self, line: str) -> None:
        """Show a line of progress; only rank 0's is shown."""


class Runtime(EvaluationRuntime, Protocol):
    """Surroundings of a worker: its data, its results and its checkpoints.

    Attributes:
        device: device that it trains on.
        evaluates: true if the worker evaluates at an epoch's end; if not, other tasks do.
    """

    device: torch.device
    evaluates: bool

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Append metrics to the run; only rank 0's are kept."""

    def report(self, metrics: Mapping[str, float], checkpoint: Path) -> None:
        """Hand over metrics and a checkpoint folder (rank 0's); every rank calls it.

        The checkpoint may be kept a while later: see `settle`.

        Raises:
            UserError: if it or the one before cannot be kept; raised on all ranks.
        """

    def settle(self) -> None:
        """Wait until the last checkpoint is kept; every rank calls it.

        Raises:
            UserError: if it cannot be kept; raised on all ranks.
        """

    def preempted(self) -> bool:
        """Return true once for each node that is about to be preempted; every rank calls it.

        Raises:
            UserError: if the last checkpoint could not be kept; raised on all ranks.
        """

    def checkpoints(self) -> Sequence[AbstractContextManager[Path]]:
        """List the run's checkpoints, the newest first and the same on every rank."""


@contextmanager
def alike() -> Iterator[None]:
    """Raise a `UserError` of one worker on all of them; every rank enters it."""
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    first = next(filter(None, gather(problem)), "")
    if first:
        raise UserError(first)


class Trainer:
    """One worker's share of a run: epochs of steps, each ended by validation and a checkpoint."""

    def __init__(
        self, task: Task, runtime: Runtime, *, weights: str | Path | None, output: str
    ) -> None:
        self.task, self.recipe, self.runtime = task, task.recipe, runtime
        self._time_left = TimeLeft()
        torch.manual_seed(task.recipe.seed)  # the same weights on every rank
        detector = task.build(weights).to(runtime.device)
        self.stride: int = detector.backbone.temporal_stride
        self.state = self._begin(detector, task.build(weights) if self._sharded else None)
        self._restore()
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

    def _wrapped(self, detector: Detector[Any, Any]) -> nn.Module:
        """Wrap the detector so that calling it averages the gradients of all workers."""
        if self._sharded or not dist.is_initialized():
            return detector
        return DistributedDataParallel(detector)

    @property
    def windows_per_step(self) -> int:
        """Number of windows that all workers together see in a step."""
        return self._windows_per_worker * self.runtime.world_size

    @property
    def _windows_per_worker(self) -> int:
        return self.recipe.batch_size * self._passes

    @property
    def _passes(self) -> int:
        """Passes of a worker per step; those of missing workers are taken over by the others."""
        scale, accumulation = self.recipe.scale, self.recipe.optim.accumulation
        return max(1, accumulation * scale.workers // self.runtime.world_size)

    def _begin(
        self, detector: Detector[Any, Any], whole: Detector[Any, Any] | None
    ) -> TrainingState:
        optim, device = self.recipe.optim, self.runtime.device
        average = build_average(detector, optim)
        if whole is not None:
            whole.to(device)
            averaged = cast("Detector[Any, Any]", average.module)
            for module in (detector, averaged):
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

    def _restore(self) -> None:
        """Go on from the newest checkpoint that every worker finds undamaged.

        Raises:
            UserError: if there are checkpoints but all of them are damaged.
        """
        damaged: list[str] = []
        for checkpoint in self.runtime.checkpoints():
            with checkpoint as folder:
                problem = next(filter(None, gather(_damage(folder))), "")
                if not problem:
                    self._go_on(folder)
                    return
            self.runtime.say(f"warning: {problem} The one before it is taken.")
            damaged.append(problem)
        if damaged:
            listed = " ".join(damaged)
            raise UserError(
                f"No checkpoint of the run can be used: train anew with --no-resume. {listed}"
            )

    def _go_on(self, folder: Path) -> None:
        state, epochs = self.state, self.recipe.epochs
        state.load(folder)
        workers = ""
        if state.world_size != self.runtime.world_size:
            # another number of workers may round the steps of an epoch otherwise
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
        """Number of steps of an epoch; counting them requires drawing all of its windows."""
        return len(self._windows(0)) // self._windows_per_worker

    def _windows(self, epoch: int, *, behind: int = 0) -> list[Window]:
        """Return this worker's windows of an epoch, after the first `behind` of all workers'."""
        windows = self.task.windows(stride=self.stride, epoch=epoch)[behind:]
        if behind and len(windows) < self.windows_per_step:
            return []  # with more workers than before, the windows left may not fill a step
        return share(
            windows,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            batch_size=self._windows_per_worker,
        )

    def run(self) -> dict[str, float]:
        """Train to the recipe's last epoch.

        Returns:
            The metrics of the last epoch.

        Raises:
            NonFiniteLossError: if a loss is not finite.
            UserError: if too many videos cannot be decoded.
        """
        metrics: dict[str, float] = {}
        self._count_parameters()
        while self.state.epoch < self.recipe.epochs:
            self._train_epoch()
            self.state.epoch += 1
            self.state.windows = 0
            check(self.state.detector)  # before a checkpoint makes the error permanent
            if self.state.epoch < self.recipe.evaluate_from or not self.runtime.evaluates:
                self._hand_over()
                continue
            evaluation = self.task.evaluate(self.state, self.runtime, steps=self._steps)
            metrics = evaluation.metrics
            seen = metrics | _reversible_metrics(self.state.detector) | {EPOCH: self.state.epoch}
            self.runtime.log(seen, step=self.state.step)
            self._checkpoint(metrics, evaluation.write if self.runtime.rank == 0 else None)
            self._time_left.evaluation()
        self.runtime.settle()
        return metrics

    def _hand_over(self) -> None:
        """Hand over the checkpoint at the end of an epoch that this worker does not evaluate."""
        state = self.state
        failures = gather(state.failures)
        all_failures(self.task.plan, failures, self.recipe.data.max_failed)
        waiting = None
        if state.epoch >= self.recipe.evaluate_from:
            self.runtime.log(_reversible_metrics(state.detector), step=state.step)
            waiting = Waiting(
                steps=self._steps,
                parts=loss_parts(state.detector),
                threads=torch.get_num_threads(),
                failures={video: reason for part in failures for video, reason in part.items()},
            )
        self._checkpoint({self.task.score: UNSCORED}, waiting=waiting)

    def _count_parameters(self) -> None:
        """Show and log the numbers of all and of the trained parameters."""
        sizes = [(p.numel(), p.requires_grad) for p in self.state.detector.parameters()]
        # of all parameters, then of those that require a gradient
        total, trained = (sum(n for n, wanted in sizes if wanted or of) for of in (True, False))
        counts = {"parameters/total": float(total), "parameters/trained": float(trained)}
        self.runtime.log(counts, step=self.state.step)
        self.runtime.say(
            f"training {trained:,} of {total:,} parameters ({trained / total:.1%}), "
            f"--model.tuning {self.recipe.model.tuning}"
        )

    def _checkpoint(
        self,
        metrics: Mapping[str, float],
        add: Callable[[Path], object] | None = None,
        *,
        waiting: Waiting | None = None,
    ) -> None:
        """Hand over a checkpoint, with the files that `add` puts into its folder."""
        epoch, step = self.state.epoch, self.state.step
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / checkpoint_name(epoch=epoch, step=step)
            folder.mkdir()
            with alike(), writing_to(scratch, what="a checkpoint"):
                self.state.save(folder, self.task.spec, write=self.runtime.rank == 0)
                if add is not None:
                    add(folder)
                complete(folder, {**metrics, EPOCH: epoch, "step": step}, waiting=waiting)
            self.runtime.report({**metrics, EPOCH: epoch}, folder)

    def _train_epoch(self) -> None:
        state, recipe = self.state, self.recipe
        windows = self._windows(state.epoch, behind=state.windows)
        steps = self._steps
        size = recipe.data.augmentation.decoded_size(recipe.data.size)
        clock = Clock()
        train_mode(state.detector, recipe.model)
        name = f"epoch {state.epoch + 1}"
        batches = clock.timed(self.runtime.stream(windows, size=size, name=name))
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
            self._time_left.step()
            if (index - 1) % max(1, steps // 5) == 0 or index == steps:  # some five lines an epoch
                self._say_progress(index, steps, metrics)
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
        """Return the augmented frames of a training batch on the device."""
        if batch.frames.is_floating_point():  # features
            return batch.frames.to(self.runtime.device, non_blocking=True)
        data, seed, epoch = self.recipe.data, self.recipe.seed, self.state.epoch
        return augment(
            batch.frames.to(self.runtime.device, non_blocking=True),
            data.augmentation,
            size=data.size,
            seeds=[clip_seed(window, seed=seed, epoch=epoch) for window in batch.windows],
        )

    def _say_progress(self, index: int, steps: int, metrics: Mapping[str, float]) -> None:
        epoch, epochs = self.state.epoch, self.recipe.epochs
        evaluated = max(epoch, self.recipe.evaluate_from - 1) if self.runtime.evaluates else epochs
        left = self._time_left.describe(
            steps=steps * (epochs - epoch) - index, evaluations=epochs - evaluated
        )
        self.runtime.say(
            f"epoch {epoch + 1}/{epochs}  step {index:>3}/{steps}  "
            f"loss {metrics['train/loss']:.3f}  {metrics['train/frames_per_second']:.0f} frames/s  "
            f"waiting for data {metrics['train/data_wait_share']:.0%}  {left}".rstrip()
        )


def _damage(folder: Path) -> str:
    """Describe the damage of a checkpoint; empty if there is none."""
    try:
        read_listing(folder, digests=True)
    except DamagedCheckpointError as problem:
        return str(problem)
    return ""


def _reversible_metrics(detector: nn.Module) -> dict[str, float]:
    """Measure how well the stages rebuild their activations, and count those that store them."""
    modes, errors = stage_modes(detector), reconstruction_errors(detector)
    # MLflow accepts only letters, digits and a few signs in a metric's name
    metrics = {f"reversible/error/{name.replace('…', '-')}": e for name, e in errors.items()}
    if modes:
        stored = sum(mode != "reversible" for mode in modes.values())
        metrics["reversible/stages_stored"] = float(stored)
    return metrics
