"""Training step that is measured: from decoded frames to gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from re2tal.detector import Detector
from re2tal.precision import Precision, autocast
from re2tal.reversible import rebuildable

if TYPE_CHECKING:  # a backbone by itself is also measured where there is no PyAV
    from pipelines.config.recipe import Recipe


SOME_CLASSES = tuple(f"class {i}" for i in range(20))
"""Classes of a recipe without its data; each costs a few hundred parameters, and logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Input of one worker's step; no optimizer is involved.

    Attributes:
        batch: number of windows.
        frames: number of frames of each window.
        size: pixels of a frame's side.
        precision: number format that branches and localizer compute in.
    """

    frames: int
    size: int
    batch: int = 1
    precision: Precision = "float32"

    def __str__(self) -> str:
        return f"{self.batch}x3x{self.frames}x{self.size}x{self.size}, {self.computing}"

    @property
    def computing(self) -> str:
        """Precision, for titles."""
        return f"{self.precision}{'' if self.precision == 'float32' else ' autocast'}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return black frames `(B, T, H, W, 3)` uint8 and a mask `(B, T)` bool that is all true."""
        shape = self.batch, self.frames, self.size, self.size, 3
        frames = torch.zeros(shape, dtype=torch.uint8, device=device)
        return frames, torch.ones(shape[:2], dtype=torch.bool, device=device)

    def noise(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return `inputs` with frames of noise, the same at every call."""
        frames, mask = self.inputs()
        frames.random_(256, generator=torch.Generator().manual_seed(0))
        return frames.to(device), mask.to(device)

    def forward(self, model: nn.Module, frames: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Compute the inputs of the losses; the losses check values, which fake tensors lack.

        Args:
            model: `Detector`, or a network of another library for `(B, 3, T, H, W)` floats.
            frames: frames as returned by `inputs`.
            mask: mask as returned by `inputs`.
        """
        with autocast(frames.device.type, self.precision):
            if isinstance(model, Detector):
                features = model.features(frames)
                predicted = model.localizer.predict(features, model.feature_mask(mask))
            else:
                predicted = (model(_normalized(frames)),)
        tensors = [part for part in predicted if isinstance(part, Tensor)]
        return tuple(tensor for tensor in tensors if tensor.requires_grad)

    def step(self, model: nn.Module, frames: Tensor, mask: Tensor) -> None:
        """Run forward and backward; see `forward` for the arguments."""
        torch.stack([t.float().sum() for t in self.forward(model, frames, mask)]).sum().backward()


def _normalized(frames: Tensor) -> Tensor:
    """Convert frames to floats; only the uint8 frames are kept for the backward pass."""

    def build(take: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        return (take(frames.permute(0, 4, 1, 2, 3)).float() / 255 - 0.45) / 0.225

    return rebuildable(build(), build, build)


def workload_of(recipe: Recipe) -> Workload:
    """Return the step of one worker of a recipe."""
    return Workload(
        batch=recipe.batch_size,
        frames=recipe.data.window.frames,
        size=recipe.data.size,
        precision=recipe.optim.precision,
    )
