"""The training loop of one worker.

It knows PyTorch and DDP, not Ray: a `Runtime` gives it data and takes results.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.checkpoints import TrainingState
from pipelines.clock import Clock
from pipelines.data import Batch, epoch_windows, share
from pipelines.finite import check_finite
from pipelines.model import build_detector, detected_classes, reported_classes, spec_of
from pipelines.optim import build_average, build_optimizer, build_schedule
from pipelines.plan import Plan, check_failures
from pipelines.progress import duration
from pipelines.recipes import Recipe
from pipelines.validation import (
    detect_windows,
    evaluate,
    gather,
    proposal_metrics,
    validation_share,
)
from re2tal.detection.files import write_detections
from re2tal.detection.nms import nms_videos
from re2tal.detection.raw import write_raw
from re2tal.detection.segments import Detections
from re2tal.detection.video_scores import fuse_videos
from re2tal.memory import MemoryMeter
from re2tal.reversible import check, reconstruction_errors, stage_modes
from re2tal.videos.augmentation import augment, clip_seed
from re2tal.videos.windows import Window

DETECTIONS_FILE = "detections.json"
RAW_FILE = "raw_detections.safetensors"


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
        """Hands over an epoch's metrics and checkpoint folder (rank 0's); every rank calls it."""

    def restored(self) -> AbstractContextManager[Path | None]:
        """Gives the checkpoint to go on from, if there is one."""


class Trainer:
    """One worker's share of a run: epochs of steps, each ended by validation and a checkpoint."""

    def __init__(
        self, recipe: Recipe, plan: Plan, runtime: Runtime, *, weights: Path | None, output: Path
    ) -> None:
        self.recipe, self.runtime, self.output = recipe, runtime, output
        # what the detector is trained on: all classes, or whether there is an action at all
        self.plan = plan.restricted(detected_classes(recipe, plan.classes))
        # what its detections are compared with
        self.reported = plan.restricted(reported_classes(recipe, plan.classes))
        self.spec = spec_of(recipe, plan.classes)
        torch.manual_seed(recipe.seed)  # the same weights on every rank
        detector = build_detector(recipe, plan.classes, weights).to(runtime.device)
        self.stride: int = detector.backbone.temporal_stride
        steps = len(self._windows(0)) // recipe.batch_size
        optimizer = build_optimizer(detector, recipe.optim)
        self.state = TrainingState(
            detector=detector,
            average=build_average(detector, recipe.optim),
            optimizer=optimizer,
            schedule=build_schedule(
                optimizer, recipe.optim, steps_per_epoch=steps, epochs=recipe.epochs
            ),
        )
        with runtime.restored() as folder:
            if folder is not None:
                self.state.load(folder)
                runtime.say(f"going on after epoch {self.state.epoch} of {recipe.epochs}")
        self.model: nn.Module = (
            DistributedDataParallel(detector) if dist.is_initialized() else detector
        )
        self.failures: dict[str, str] = {}

    def _windows(self, epoch: int) -> list[Window]:
        windows = epoch_windows(
            self.plan.training,
            self.plan.classes,
            self.recipe.data.window,
            stride=self.stride,
            seed=self.recipe.seed,
            epoch=epoch,
        )
        return share(
            windows,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            batch_size=self.recipe.batch_size,
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
            check(self.state.detector)  # before what cannot be taken back: a checkpoint
            metrics, detections, raw = self._validate()
            seen = metrics | _reversible_metrics(self.state.detector)
            self.runtime.log(seen, step=self.state.step)
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = Path(folder) / "checkpoint"
                if self.runtime.rank == 0:
                    self.state.save(checkpoint, self.spec)
                    write_detections(
                        checkpoint / DETECTIONS_FILE, detections, self.reported.classes
                    )
                    if self.recipe.save_raw:
                        write_raw(checkpoint / RAW_FILE, raw, self.plan.classes)
                self.runtime.report({**metrics, "epoch": self.state.epoch}, checkpoint)
        return metrics

    def _train_epoch(self) -> None:
        # Dropout and drop path: other masks on every rank and in every epoch, and the same ones
        # whether or not the run was interrupted before the epoch.
        torch.manual_seed(self.recipe.seed + 1 + self.runtime.rank + 1000 * self.state.epoch)
        windows = self._windows(self.state.epoch)
        steps = len(windows) // self.recipe.batch_size
        size = self.recipe.data.augmentation.decoded_size(self.recipe.data.size)
        clock = Clock()
        self.model.train()
        if self.recipe.model.freeze_backbone:
            self.state.detector.backbone.eval()
        for index, batch in enumerate(clock.timed(self.runtime.stream(windows, size=size))):
            self.failures |= batch.failures
            metrics = self._step(batch) | clock.metrics(self.runtime.world_size)
            self.runtime.log(metrics, step=self.state.step)
            if index % max(1, steps // 5) == 0 or index == steps - 1:
                self._say_progress(index, steps, metrics, clock)

    def _augmented(self, batch: Batch) -> Tensor:
        """The frames of a training batch on the device, as the network is to see them."""
        data, seed, epoch = self.recipe.data, self.recipe.seed, self.state.epoch
        return augment(
            batch.frames.to(self.runtime.device, non_blocking=True),
            data.augmentation,
            size=data.size,
            seeds=[clip_seed(window, seed=seed, epoch=epoch) for window in batch.windows],
        )

    def _step(self, batch: Batch) -> dict[str, float]:
        device, optim = self.runtime.device, self.recipe.optim
        autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=optim.precision == "bfloat16"
        )
        with MemoryMeter(device) as memory:
            batch = replace(batch, frames=self._augmented(batch))
            with autocast:
                terms = self.model(
                    batch.frames,
                    batch.mask.to(device, non_blocking=True),
                    [target.to(device) for target in batch.targets],
                )
                loss = torch.stack(list(terms.values())).sum()
            check_finite(loss, terms, batch, step=self.state.step, output=self.output)
            self.state.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            trained = [p for p in self.state.detector.parameters() if p.requires_grad]
            norm = nn.utils.clip_grad_norm_(trained, optim.clip)
            rates = {f"lr/{g['name']}": g["lr"] for g in self.state.optimizer.param_groups}
            self.state.optimizer.step()
            self.state.schedule.step()
            self.state.average.update_parameters(self.state.detector)
        self.state.step += 1
        return {
            "train/loss": float(loss.detach()),
            **{f"train/loss/{name}": float(value.detach()) for name, value in terms.items()},
            "train/gradient_norm": float(norm),
            **rates,
            **{f"memory/{name}": value for name, value in memory.metrics().items()},
        }

    def _say_progress(
        self, index: int, steps: int, metrics: Mapping[str, float], clock: Clock
    ) -> None:
        left = (
            clock.elapsed
            / (index + 1)
            * (steps * (self.recipe.epochs - self.state.epoch) - index - 1)
        )
        self.runtime.say(
            f"epoch {self.state.epoch + 1}/{self.recipe.epochs}  step {index + 1:>3}/{steps}  "
            f"loss {metrics['train/loss']:.3f}  {metrics['train/frames_per_second']:.0f} frames/s  "
            f"waiting for data {metrics['train/data_wait_share']:.0%}  left {duration(left)}"
        )

    def _validate(
        self,
    ) -> tuple[dict[str, float], dict[str, Detections], dict[str, Detections]]:
        """The metrics of an epoch, the detections of all videos, and those before suppression."""
        recipe, plan, runtime = self.recipe, self.plan, self.runtime
        before = time.perf_counter()
        windows = validation_share(
            plan.validation,
            plan.classes,
            recipe.data.window,
            stride=self.stride,
            rank=runtime.rank,
            world_size=runtime.world_size,
        )
        durations = {v.annotation.video_id: v.annotation.duration for v in plan.validation}
        detector: Any = self.state.average.module.eval()
        raw, failures = detect_windows(
            detector, runtime.stream(windows, size=recipe.data.size), durations
        )
        suppressed = nms_videos(raw, recipe.nms)
        shares = gather((suppressed, raw if recipe.save_raw else {}, {**self.failures, **failures}))
        detections = {video: found for part in shares for video, found in part[0].items()}
        raw = {video: found for part in shares for video, found in part[1].items()}
        failed = dict(plan.failures)
        for part in shares:
            failed |= part[2]
        check_failures(failed, len(plan.uris) + len(plan.failures), recipe.data.max_failed)
        metrics = {"videos/failed": float(len(failed))}
        if recipe.model.class_agnostic:
            metrics |= proposal_metrics(detections, plan.validation, plan.classes)
        if plan.video_scores is not None:
            top = recipe.data.video_scores_top
            detections = fuse_videos(detections, plan.video_scores, top=top)
        reported = self.reported
        metrics |= evaluate(
            detections,
            reported.validation,
            reported.classes,
            recipe.thresholds,
            ignore_ambiguous=recipe.ignore_ambiguous,
        )
        runtime.say(
            f"epoch {self.state.epoch}/{recipe.epochs}  validation  mAP {metrics['val/mAP']:.3f}  "
            f"({len(detections)} videos, {duration(time.perf_counter() - before)})"
        )
        return metrics, detections, raw


def _reversible_metrics(detector: nn.Module) -> dict[str, float]:
    """How well the stages rebuild their activations, and how many have to store them instead."""
    modes, errors = stage_modes(detector), reconstruction_errors(detector)
    # MLflow takes letters, digits and a few signs for a metric's name.
    metrics = {f"reversible/error/{name.replace('…', '-')}": e for name, e in errors.items()}
    if modes:
        stored = sum(mode != "reversible" for mode in modes.values())
        metrics["reversible/stages_stored"] = float(stored)
    return metrics
