"""From pixels to segments: a backbone and a localizer as one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar, overload

import torch
from torch import Tensor, nn

from re2tal.backbones.precomputed import Precomputed
from re2tal.backbones.protocol import Backbone
from re2tal.detection.segments import Detections
from re2tal.localizers.protocol import Localizer, Losses, Targets
from re2tal.reversible import rebuildable

BackboneT = TypeVar("BackboneT", bound=Backbone)
LocalizerT = TypeVar("LocalizerT", bound=Localizer)


def grey_levels(values: Sequence[float]) -> Tensor:
    """A mean or deviation of red, green and blue in [0, 1] as grey levels `(3, 1, 1, 1)`."""
    return 255 * torch.tensor(values).view(3, 1, 1, 1)


def normalize(frames: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """What a backbone sees of frames.

    Args:
        frames: `(B, T, H, W, 3)` uint8.
        mean: `(3, 1, 1, 1)` grey levels.
        std: likewise.

    Returns:
        `(B, 3, T, H, W)` float32.
    """
    # A GPU's convolutions want the channels last, as they are in frames; a CPU's want planes.
    layout = torch.contiguous_format if frames.device.type == "cpu" else torch.preserve_format
    values = frames.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=layout)
    return values.sub_(mean).div_(std)  # in place: hundreds of megabytes


class Detector(nn.Module, Generic[BackboneT, LocalizerT]):
    """Temporal action localization, end to end.

    Args:
        backbone: `(B, 3, T, H, W) -> (B, C, T / temporal_stride)`, a module.
        localizer: features to losses or detections, a module built for the backbone's channels.
        mean: of the red, green and blue values in [0, 1] that the backbone was pretrained with;
            by default ImageNet's, as torchvision's Video Swin weights want it.
        std: their standard deviation, likewise.
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
        # Not in the state: they belong to the configuration, as the class names do.
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, grey_levels(values), persistent=False)

    @property
    def num_classes(self) -> int:
        """Labels are 0 to `num_classes - 1`."""
        return self.localizer.num_classes

    @overload
    def forward(self, frames: Tensor, mask: Tensor, targets: Sequence[Targets]) -> Losses: ...
    @overload
    def forward(self, frames: Tensor, mask: Tensor, targets: None = None) -> list[Detections]: ...

    def forward(
        self, frames: Tensor, mask: Tensor, targets: Sequence[Targets] | None = None
    ) -> Losses | list[Detections]:
        """Losses against `targets`, or detections without them.

        Args:
            frames: `(B, T, H, W, 3)` uint8, T a multiple of the backbone's temporal stride; or, if
                the backbone is `Precomputed`, features `(B, T / temporal_stride, C)`.
            mask: `(B, T)` bool, true at frames of the video, false on padding.
            targets: of each window its actions, in feature-grid units.

        Returns:
            As `re2tal.localizers.Localizer`: loss terms, or of each window its detections in
            feature-grid units before non-maximum suppression.

        Raises:
            ValueError: If `frames` or `mask` have another shape or type.
        """
        precomputed = isinstance(self.backbone, Precomputed)
        features = self.backbone(frames if precomputed else self.normalized(frames))
        return self.localizer(features, self.feature_mask(mask), targets)

    def normalized(self, frames: Tensor) -> Tensor:
        """What the backbone sees of `frames` `(B, T, H, W, 3)`: float32 `(B, 3, T, H, W)`.

        A rewired backbone keeps the frames, a quarter of the size, and calls this once more in its
        backward pass.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise ValueError(
                f"Frames must be uint8 (B, T, H, W, 3), but got {frames.dtype} "
                f"{tuple(frames.shape)}."
            )

        def pixels() -> Tensor:
            return normalize(frames, self.mean, self.std)

        return rebuildable(pixels(), pixels)

    def feature_mask(self, mask: Tensor) -> Tensor:
        """`(B, T)` valid frames to `(B, T / stride)` features: those that saw a valid frame."""
        stride = self.backbone.temporal_stride
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] % stride:
            raise ValueError(
                f"The frame mask must be bool (B, T) with T a multiple of the backbone's temporal "
                f"stride of {stride}, but got {mask.dtype} {tuple(mask.shape)}."
            )
        return mask.unflatten(1, (-1, stride)).any(dim=2)
