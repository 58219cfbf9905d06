"""Model from pixels to segments: a backbone and a localizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from re2tal.backbones.precomputed import Precomputed
from re2tal.backbones.protocol import Backbone
from re2tal.detection.segments import Detections
from re2tal.localizers.protocol import Localizer, Losses, Targets
from re2tal.reversible import rebuildable, spent

BackboneT = TypeVar("BackboneT", bound=Backbone)
LocalizerT = TypeVar("LocalizerT", bound=Localizer)


def grey_levels(values: Sequence[float]) -> Tensor:
    """Convert a mean or deviation of colours in [0, 1] to grey levels `(3, 1, 1, 1)`."""
    return 255 * torch.tensor(values).view(3, 1, 1, 1)


def normalize(
    frames: Tensor, mean: Tensor, std: Tensor, take: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Normalise frames for a backbone.

    Args:
        frames: `(B, T, H, W, 3)` uint8.
        mean: `(3, 1, 1, 1)` mean in grey levels.
        std: `(3, 1, 1, 1)` standard deviation in grey levels.
        take: choice of the frames `(B, 3, T, H, W)` that are wanted, by default all.

    Returns:
        `(B, 3, T, H, W)` float32.
    """
    # Convolutions are faster with channels last on a GPU, which is the frames' layout, and with
    # planes on a CPU.
    layout = torch.contiguous_format if frames.device.type == "cpu" else torch.preserve_format
    values = take(frames.permute(0, 4, 1, 2, 3)).to(torch.float32, memory_format=layout)
    return values.sub_(mean).div_(std)  # in place: hundreds of megabytes


class Detector(nn.Module, Generic[BackboneT, LocalizerT]):
    """Backbone and localizer as one model, trained end to end.

    Args:
        backbone: module `(B, 3, T, H, W) -> (B, C, T / temporal_stride)`.
        localizer: module from features to losses or detections, built for the backbone's channels.
        mean: mean of red, green and blue in [0, 1] in the backbone's pretraining; by default
            ImageNet's, for torchvision's Video Swin weights.
        std: standard deviation of the same colours.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: BackboneT,
        localizer: LocalizerT,
        *,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.localizer = localizer
        # Not in the state: like the class names, they belong to the configuration.
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, grey_levels(values), persistent=False)

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are 0 to `num_classes - 1`."""
        return self.localizer.num_classes

    @property
    def multiple(self) -> int:
        """Divisor of the number of frames of a window."""
        backbone = self.backbone
        return math.lcm(backbone.multiple, backbone.temporal_stride * self.localizer.multiple)

    def forward(
        self, frames: Tensor, mask: Tensor, targets: Sequence[Targets] | None = None
    ) -> Losses | list[Detections]:
        """Compute losses against `targets`, or detections without them.

        Args:
            frames: `(B, T, H, W, 3)` uint8, T a multiple of the backbone's temporal stride; or, if
                the backbone is `Precomputed`, features `(B, T / temporal_stride, C)`.
            mask: `(B, T)` bool, true at frames of the video, false on padding.
            targets: actions of each window, in feature-grid units.

        Returns:
            Result of the localizer (`re2tal.localizers.Localizer`): loss terms, or the detections
            of each window in feature-grid units, before non-maximum suppression.

        Raises:
            ValueError: `frames` or `mask` have another shape or type.
        """
        return self.localizer(self.features(frames), self.feature_mask(mask), targets)

    def features(self, frames: Tensor) -> Tensor:
        """Compute the features `(B, C, T')` of the `frames` of `forward`."""
        video = frames if isinstance(self.backbone, Precomputed) else self.normalized(frames)
        if getattr(self.backbone, "reads_once", False):
            spent(video)  # a rewired backbone recomputes the floats in its backward
        features: Tensor = self.backbone(video)
        return features

    def normalized(self, frames: Tensor) -> Tensor:
        """Normalise `frames` `(B, T, H, W, 3)` to float32 `(B, 3, T, H, W)`.

        A rewired backbone keeps only the uint8 frames, a quarter of the bytes, and normalises again
        in its backward pass.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise ValueError(
                f"Frames must be uint8 (B, T, H, W, 3), but got {frames.dtype} "
                f"{tuple(frames.shape)}."
            )

        pixels = partial(normalize, frames, self.mean, self.std)
        return rebuildable(pixels(), pixels, pixels)

    def feature_mask(self, mask: Tensor) -> Tensor:
        """Reduce a frame mask `(B, T)` to features `(B, T / stride)` with any valid frame."""
        stride = self.backbone.temporal_stride
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] % stride:
            raise ValueError(
                f"The frame mask must be bool (B, T) with T a multiple of the backbone's temporal "
                f"stride of {stride}, but got {mask.dtype} {tuple(mask.shape)}."
            )
        seen: Tensor = mask.unflatten(1, (-1, stride)).any(dim=2)  # (B, T / stride, stride)
        return seen
