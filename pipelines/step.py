"""One step of the optimizer: the passes of its micro-batches, and what is done with gradients."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pipelines.checkpoints import TrainingState
from pipelines.data import Batch
from pipelines.finite import non_finite_error
from pipelines.precision import autocast
from pipelines.settings import OptimConfig
from re2tal.memory import MemoryMeter


class Stepper:
    """Trains on the windows of one step at a time.

    However the windows of a step are laid out over workers and passes, the losses are those of all
    of them: the gradients of passes and workers are averaged, and what the losses are divided by is
    counted over the step.

    Args:
        model: what computes losses: the detector, or what wraps it for several workers.
        state: the detector, its optimizer and all that goes with it.
        config: precision, accumulation and clipping.
        augment: gives the frames of a batch as the network is to see them, on the device.
        device: where the detector is.
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
        """Takes a step.

        Args:
            batches: of each pass the windows.

        Returns:
            Metrics: the loss and its terms over all workers and passes, the norm of the gradient
            before clipping, learning rates, memory.

        Raises:
            NonFiniteLossError: if a loss is not finite, on all workers alike.
        """
        state = self._state
        with MemoryMeter(self._device) as memory:
            state.detector.localizer.begin_step(
                [state.detector.feature_mask(batch.mask).to(self._device) for batch in batches],
                [[target.to(self._device) for target in batch.targets] for batch in batches],
            )
            state.optimizer.zero_grad(set_to_none=True)
            terms = [
                self._pass(batch, of=len(batches), last=batch is batches[-1]) for batch in batches
            ]
            losses = _averaged(terms)
            if not math.isfinite(losses["train/loss"]):
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
            self._state.scaler.scale(loss / of).backward()
        return {"train/loss": loss.detach()} | {
            f"train/loss/{name}": value.detach() for name, value in terms.items()
        }

    def _gradients_shared(self, last: bool) -> AbstractContextManager[None]:
        """Workers exchange gradients in the last pass of a step only."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(last)
        if isinstance(self._model, DistributedDataParallel) and not last:
            return self._model.no_sync()
        return nullcontext()

    def _update(self) -> float:
        state = self._state
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(self._trained, self._config.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        scale = state.scaler.get_scale()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.scaler.get_scale() >= scale:  # else the gradients overflowed: nothing was learnt
            state.schedule.step()
            state.average.update_parameters(state.detector)
        return float(norm)


def _averaged(passes: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The mean over passes and workers."""
    names = list(passes[0])
    values = torch.stack([torch.stack([terms[name] for name in names]) for terms in passes])
    mean = values.float().mean(dim=0)
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return dict(zip(names, mean.tolist(), strict=True))


def in_passes(batches: Iterator[Batch], accumulation: int) -> Iterator[list[Batch]]:
    """Groups batches into steps; batches that do not fill a step at the end are left out.

    Args:
        batches: of an epoch.
        accumulation: batches a step.
    """
    step: list[Batch] = []
    for batch in batches:
        step.append(batch)
        if len(step) == accumulation:
            yield step
            step = []


def seed_step(seed: int, *, step: int, rank: int) -> None:
    """Seeds dropout and drop path of a step, as a function of where in the run it is.

    So a run that goes on from a checkpoint needs no generator's state to draw the same masks.

    Args:
        seed: of the run.
        step: finished steps.
        rank: of the worker, each of which draws masks of its own.
    """
    (mixed,) = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed >> 1))
