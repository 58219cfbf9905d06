"""A loss that is not finite ends a run, and what it was computed of is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from pipelines.data import Batch
from pipelines.storage import join, replacing


class NonFiniteLossError(Exception):
    """The loss became NaN or infinite; the message names step, videos and the saved batch."""


def non_finite_error(
    passes: Sequence[Mapping[str, Tensor]], batches: Sequence[Batch], *, step: int, output: str
) -> NonFiniteLossError:
    """Saves the first batch whose loss is NaN or infinite, and says so.

    Args:
        passes: of each pass of this worker the loss, first, and its terms, by name.
        batches: what they were computed of, as they were decoded.
        step: number of the training step.
        output: path or URI of the folder that the batch is saved in.
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
