"""What a backbone is: frames in, temporal features out."""

from typing import Protocol

from torch import Tensor


class Backbone(Protocol):
    """Turns frames into temporal features. A `torch.nn.Module` in practice.

    Attributes:
        channels: C of the features.
        temporal_stride: frames per feature.
    """

    channels: int
    temporal_stride: int

    def __call__(self, video: Tensor) -> Tensor:
        """Spatially pooled features.

        Args:
            video: `(B, 3, T, H, W)` normalised frames, T a multiple of `temporal_stride`.

        Returns:
            `(B, C, T / temporal_stride)`.
        """
        ...
