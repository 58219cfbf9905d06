"""Protocols of a backbone and its configuration: frames in, temporal features out."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class BackboneConfig(Protocol):
    """Shape of a backbone: a frozen dataclass that builds it.

    One with a field `depths`, the blocks of each stage, can also be made deeper and shallower, as
    in the memory planner.
    """

    def build(self) -> Any:
        """Build a `Backbone`, a module, with random weights."""
        ...


@runtime_checkable
class Strided(BackboneConfig, Protocol):
    """Shape of a backbone that can have several numbers of frames per feature."""

    def with_stride(self, stride: int) -> BackboneConfig:
        """Return the same backbone with another number of frames per feature.

        Raises:
            ValueError: it cannot have that number.
        """
        ...


class Backbone(Protocol):
    """Map from frames to temporal features; a `torch.nn.Module` in practice.

    Attributes:
        channels: C of the features.
        temporal_stride: frames per feature.
        multiple: number whose multiples are the possible numbers of frames of a window.

    One that reads its input once, in a stem, may say so by an attribute `reads_once` that is true:
    the normalised frames are then given back when the stem has read them.
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
        """Layer of the parameter `name`: 0 for the stem, then 1 for each block in turn."""
        ...


@runtime_checkable
class Placed(Protocol):
    """Backbone that also shows its features of each place, before they are pooled."""

    def places(self, video: Tensor) -> Tensor:
        """Compute the features of each place, of the input of a `Backbone`.

        Returns:
            `(B, T', P, C)`: the P places of a grid row by row, at the backbone's own rate.
        """
        ...
