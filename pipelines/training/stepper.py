"""One training step: its passes, their loss and gradients, and the optimizer's update."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pipelines.config.recipe import OptimConfig
from pipelines.core.storage import join, replacing
from pipelines.data.batches import Batch
from pipelines.training.checkpoints import TrainingState
from re2tal.errors import UserError
from re2tal.memory import MemoryMeter
from re2tal.precision import autocast


class NonFiniteLossError(UserError):
    """Loss that is NaN or infinite; the message names step, videos and the saved batch."""


def non_finite_error(
    passes: Sequence[Mapping[str, Tensor]], batches: Sequence[Batch], *, step: int, output: str
) -> NonFiniteLossError:
    """Save the first batch whose loss is NaN or infinite, and return the error to raise.

    Args:
        passes: for each pass of this worker, the loss and then its terms, by name.
        batches: decoded batches of the passes.
        step: number of the training step.
        output: path or URI of the folder that receives the batch.
    """
    bad = (
        (terms, batch)
        for terms, batch in zip(passes, batches, strict=True)
        if not bool(torch.isfinite(next(iter(terms.values()))))
    )
    terms, batch = next(bad, (None, None))
    if terms is None or batch is None:
        return NonFiniteLossError(f"The loss is not finite at step {step} on another worker.")
    path = join(output, f"non_finite_step_{step}.pt")
    _save(batch, path)
    videos = ", ".join(w.video_id for w in batch.windows)
    values = ", ".join(f"{name} {float(value):g}" for name, value in terms.items())
    return NonFiniteLossError(
        f"The loss is not finite at step {step} ({values}), on windows of the videos {videos}. "
        f"The batch is saved in {path}. Lower the learning rates (--optim.backbone-lr, "
        "--optim.localizer-lr), or compute in float32 (--optim.precision float32)."
    )


def _save(batch: Batch, uri: str) -> None:
    content = {
        "frames": batch.frames.cpu(),
        "mask": batch.mask,
        "targets": [asdict(target) for target in batch.targets],
        "windows": [
            {"video_id": w.video_id, "grid": asdict(w.grid), "copy": w.copy and asdict(w.copy)}
            for w in batch.windows
        ],
    }
    with replacing(uri) as stream:
        torch.save(content, stream)


class Stepper:
    """Trainer of one step at a time.

    The loss of a step does not depend on the layout of its windows over workers and passes: the
    gradients of passes and workers are averaged, and the normalizers of the losses are counted over
    the whole step.

    Args:
        model: module that computes the losses: the detector, or its wrapper for several workers.
        state: detector, optimizer and the rest of the training state.
        config: precision, accumulation and clipping.
        augment: function from a batch to its augmented frames on the device.
        device: device of the detector.
        output: folder for a batch whose loss is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        state: TrainingState,
        config: OptimConfig,
        *,
        augment: Callable[[Batch], Tensor],
        device: torch.device,
        output: str,
    ) -> None:
        self._model, self._state, self._config, self._augment = model, state, config, augment
        self._device, self._output = device, output
        self._trained = [p for p in state.detector.parameters() if p.requires_grad]

    def __call__(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Take a step on one batch per pass.

        Returns:
            Metrics: the loss and its terms over all workers and passes, the norm of the gradient
            before clipping, learning rates, memory.

        Raises:
            NonFiniteLossError: if a loss is not finite, on all workers alike.
        """
        state = self._state
        with MemoryMeter(self._device) as memory:
            # the normalizers count the targets of all passes before the first pass divides by them
            state.detector.localizer.begin_step(
                [state.detector.feature_mask(batch.mask).to(self._device) for batch in batches],
                [[target.to(self._device) for target in batch.targets] for batch in batches],
            )
            state.optimizer.zero_grad(set_to_none=True)
            terms = [
                self._pass(batch, of=len(batches), last=batch is batches[-1]) for batch in batches
            ]
            losses = _averaged(terms)
            if not math.isfinite(losses["train/loss"]):  # the mean over workers: all of them raise
                raise non_finite_error(terms, batches, step=state.step, output=self._output)
            rates = {f"lr/{group['name']}": group["lr"] for group in state.optimizer.param_groups}
            norm = self._update()
        state.step += 1
        return {
            **losses,
            "train/gradient_norm": norm,
            **rates,
            **({"train/loss_scale": state.scaler.get_scale()} if state.scaler.is_enabled() else {}),
            **{f"memory/{name}": value for name, value in memory.metrics().items()},
        }

    def _pass(self, batch: Batch, *, of: int, last: bool) -> dict[str, Tensor]:
        with self._gradients_shared(last):
            with autocast(self._device.type, self._config.precision):
                terms: dict[str, Tensor] = self._model(
                    self._augment(batch),
                    batch.mask.to(self._device, non_blocking=True),
                    [target.to(self._device) for target in batch.targets],
                )
                loss = torch.stack(list(terms.values())).sum()
            self._state.scaler.scale(loss / of).backward()  # the mean over passes
        return {"train/loss": loss.detach()} | {
            f"train/loss/{name}": value.detach() for name, value in terms.items()
        }

    def _gradients_shared(self, last: bool) -> AbstractContextManager[None]:
        """Let workers exchange gradients in the last pass of a step only."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(last)
        if isinstance(self._model, DistributedDataParallel) and not last:
            return self._model.no_sync()
        return nullcontext()

    def _update(self) -> float:
        state = self._state
        state.scaler.unscale_(state.optimizer)  # clipping needs gradients without the loss scale
        norm = nn.utils.clip_grad_norm_(self._trained, self._config.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        scale = state.scaler.get_scale()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.scaler.get_scale() >= scale:  # else gradients overflowed: the step was skipped
            state.schedule.step()
            state.average.update_parameters(state.detector)
        return float(norm)


def _averaged(passes: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Average the loss and its terms over passes and workers."""
    names = list(passes[0])
    # (passes, terms)
    values = torch.stack([torch.stack([terms[name] for name in names]) for terms in passes])
    mean = values.float().mean(dim=0)
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return dict(zip(names, mean.tolist(), strict=True))


def in_passes(batches: Iterator[Batch], accumulation: int) -> Iterator[tuple[Batch, ...]]:
    """Group `accumulation` batches into each step; an incomplete last step is left out."""
    return zip(*[batches] * accumulation, strict=False)  # each place draws from the same iterator


def seed_step(seed: int, *, step: int, rank: int) -> None:
    """Seed dropout and drop path of a step, as a function of its position in the run.

    A resumed run thus draws the same masks without a saved generator state.

    Args:
        seed: seed of the run.
        step: number of finished steps.
        rank: rank of the worker, each of which draws masks of its own.
    """
    (mixed,) = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed >> 1))
