"""The models that are trained, and on what."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torchvision.models.video import SwinTransformer3d, r3d_18, swin3d_t

from re2tal.backbones.slowfast import SlowFastConfig, slowfast_50, slowfast_101
from re2tal.backbones.slowfast.blocks import Bottleneck
from re2tal.reversible import rebuildable


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A training step, from pixels to gradients and without an optimizer.

    Attributes:
        model: what is trained, a key of `MODELS`.
        frames: of the one video in the batch.
        size: height and width of a frame.
        bfloat16: compute in bfloat16 autocast instead of float32.
    """

    model: str
    frames: int
    size: int
    bfloat16: bool = False

    def __str__(self) -> str:
        return f"{self.model}, 1x3x{self.frames}x{self.size}x{self.size}, {self.precision}"

    @property
    def precision(self) -> str:
        """What the model computes in, for titles."""
        return "bfloat16 autocast" if self.bfloat16 else "float32"

    def of(self, frames: int) -> Self:
        """The same with another number of frames."""
        return replace(self, frames=frames)

    def build(self) -> nn.Module:
        """The model with random weights, in training mode; the same at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MODELS[self.model]().train()

    def video(self, device: torch.device | str = "cpu") -> Tensor:
        """``(1, T, H, W, 3)`` of uint8, as a decoder returns it; the same at every call."""
        shape = (1, self.frames, self.size, self.size, 3)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return noise.to(device)

    def forward(self, model: nn.Module, video: Tensor) -> Tensor:
        """The model's result for a video, of which only the uint8 frames need to be kept."""

        def normalised() -> Tensor:
            return (video.permute(0, 4, 1, 2, 3).float() / 255 - 0.45) / 0.225

        with torch.autocast(video.device.type, torch.bfloat16, enabled=self.bfloat16):
            result: Tensor = model(rebuildable(normalised(), normalised))
        return result

    def step(self, model: nn.Module, video: Tensor) -> None:
        """Forward and backward."""
        self.forward(model, video).float().sum().backward()


def _swin(*depths: int) -> nn.Module:
    return SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=96,
        depths=list(depths),
        num_heads=[3, 6, 12, 24],
        window_size=[8, 7, 7],
        stochastic_depth_prob=0.1,
    )


def _toy_swin() -> nn.Module:
    return SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=[2, 4, 4],
        num_classes=3,
    )


def _slowfast(config: SlowFastConfig) -> nn.Module:
    """With branches as small as those of a trained network.

    Its norms use the statistics that they were loaded with. Those of random weights normalize
    nothing, and every branch would multiply the streams by 1.3: by 500 over the 22 of a stage.
    """
    model = config.build()
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.conv3.bn.weight, 0.1)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "swin3d_t": swin3d_t,
    "swin3d_t with 12 blocks in stage 3": lambda: _swin(2, 2, 12, 2),
    "slowfast_50": lambda: _slowfast(slowfast_50()),
    "slowfast_101": lambda: _slowfast(slowfast_101()),
    "r3d_18": r3d_18,
    "toy_swin": _toy_swin,
}

SMALL = Workload(model="swin3d_t", frames=32, size=112)
"""What two CPU cores train in seconds."""

LONG = Workload(model="swin3d_t", frames=768, size=224, bfloat16=True)
"""What Re2TAL trains end to end, of which the memory can be predicted anywhere."""
