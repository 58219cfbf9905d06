"""A loss that is not finite ends a run, and what it was computed of is kept."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from pipelines.data import Batch


class NonFiniteLossError(Exception):
    """The loss became NaN or infinite; the message names step, videos and the saved batch."""


def check_finite(
    loss: Tensor, terms: Mapping[str, Tensor], batch: Batch, *, step: int, output: Path
) -> None:
    """Saves the batch and stops if the loss is NaN or infinite.

    Args:
        loss: the sum of the terms.
        terms: of the loss, by name.
        batch: what it was computed of.
        step: number of the training step.
        output: folder that the batch is saved in.

    Raises:
        NonFiniteLossError: if the loss is not finite.
    """
    if bool(torch.isfinite(loss)):
        return
    path = output / f"non_finite_step_{step}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "frames": batch.frames.cpu(),
            "mask": batch.mask,
            "targets": [asdict(target) for target in batch.targets],
            "windows": [
                {"video_id": w.video_id, "grid": asdict(w.grid), "copy": w.copy and asdict(w.copy)}
                for w in batch.windows
            ],
        },
        path,
    )
    videos = ", ".join(w.video_id for w in batch.windows)
    values = ", ".join(f"{name} {float(value.detach()):g}" for name, value in terms.items())
    raise NonFiniteLossError(
        f"The loss is not finite at step {step} ({values}), on windows of the videos {videos}. "
        f"The batch is saved in {path}. Lower the learning rates (--optim.backbone-lr, "
        "--optim.localizer-lr), or compute in float32 (--optim.precision float32)."
    )
