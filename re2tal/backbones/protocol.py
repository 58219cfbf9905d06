"""Protocols of a backbone and its configuration: frames in, temporal features out."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class BackboneConfig(Protocol):
    """Shape of a backbone: a frozen dataclass that builds the module.

    With a field `depths`, the number of blocks of each stage, tools such as the memory planner can
    also make the backbone deeper or shallower.
    """

    def build(self) -> Any:
        """Build a `Backbone` module with random weights."""
        ...


@runtime_checkable
class Strided(BackboneConfig, Protocol):
    """Shape of a backbone with a selectable temporal stride."""

    def with_stride(self, stride: int) -> BackboneConfig:
        """Return the same backbone with another number of frames per feature.

        Raises:
            ValueError: the backbone does not support that number.
        """
        ...


class Backbone(Protocol):
    """Map from frames to temporal features; a `torch.nn.Module` in practice.

    Attributes:
        channels: C of the features.
        temporal_stride: frames per feature.
        multiple: the number of frames of a window must be a multiple of this.

    A backbone that reads its input only in its stem may have an attribute `reads_once` that is
    true: the memory of the normalised frames is then freed after the stem.
    """

    channels: int
    temporal_stride: int
    multiple: int

    def __call__(self, video: Tensor) -> Tensor:
        """Compute spatially pooled features.

        Args:
            video: `(B, 3, T, H, W)` normalised frames, T a multiple of `multiple`.

        Returns:
            `(B, C, T / temporal_stride)`.
        """
        ...

    def layer_of(self, name: str) -> int:
        """Return the layer of the parameter `name`: 0 for the stem, then one for each block."""
        ...


@runtime_checkable
class Placed(Protocol):
    """Backbone that also returns its features before spatial pooling."""

    def places(self, video: Tensor) -> Tensor:
        """Compute the features of each place, from the input of a `Backbone`.

        Returns:
            `(B, T', P, C)`: the P places of the grid row by row, at the backbone's own rate.
        """
        ...
