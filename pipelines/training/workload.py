"""The step whose memory is counted: from frames as they are decoded to what the losses compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipelines.config.recipe import Precision, autocast
from re2tal.detector import Detector

if TYPE_CHECKING:  # a backbone by itself is also profiled where there is no PyAV
    from pipelines.config.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What one worker's step is given.

    Attributes:
        batch: windows.
        frames: of each window.
        size: pixels of a frame's side.
        precision: what branches and localizer compute in.
    """

    batch: int
    frames: int
    size: int
    precision: Precision

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Black frames `(B, T, H, W, 3)` uint8 and a mask `(B, T)` bool that is all true."""
        shape = self.batch, self.frames, self.size, self.size, 3
        frames = torch.zeros(shape, dtype=torch.uint8, device=device)
        return frames, torch.ones(shape[:2], dtype=torch.bool, device=device)

    def step(self, detector: Detector, frames: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Predictions for the frames, up to what the losses compare.

        The losses themselves check values, which fake tensors do not have.
        """
        with autocast(frames.device.type, self.precision):
            features = detector.backbone(detector.normalized(frames))
            predicted = detector.localizer.predict(features, detector.feature_mask(mask))
        tensors = [part for part in predicted if isinstance(part, Tensor)]
        return tuple(tensor for tensor in tensors if tensor.requires_grad)


def workload_of(recipe: Recipe) -> Workload:
    """The step of a recipe.

    Args:
        recipe: the run's configuration.
    """
    return Workload(
        batch=recipe.batch_size,
        frames=recipe.data.window.frames,
        size=recipe.data.size,
        precision=recipe.optim.precision,
    )
