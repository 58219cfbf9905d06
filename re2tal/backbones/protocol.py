"""What a backbone is: frames in, temporal features out."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class BackboneConfig(Protocol):
    """The shape of a backbone: a frozen dataclass that builds it."""

    def build(self) -> nn.Module:
        """A `Backbone` with random weights."""
        ...


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

    def layer_of(self, name: str) -> int:
        """The layer that a parameter belongs to: 0 for the stem, then 1 for each block in turn.

        Args:
            name: of the parameter.
        """
        ...
