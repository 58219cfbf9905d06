"""Features extracted in advance, in place of a backbone (step 2 of the usual two-step training)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from re2tal.errors import check_within

TRAINED_ON_FEATURES = (
    "This detector was trained on features and has no backbone, so it cannot see videos. Evaluate "
    "the detections that its training wrote, or train a detector on frames."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecomputedConfig:
    """Shape of precomputed features, in place of a backbone's.

    Attributes:
        channels: channels C of the features.
        temporal_stride: frames of a window per feature.
    """

    channels: int
    temporal_stride: int

    def __post_init__(self) -> None:
        check_within(self, channels=(1, 2**20), temporal_stride=(1, 2**16))

    def build(self) -> Precomputed:
        """Build the module that receives the features; it has no weights."""
        return Precomputed(self)


class Precomputed(nn.Module):
    """Module that returns its input features, with the attributes of a `Backbone`."""

    def __init__(self, config: PrecomputedConfig) -> None:
        super().__init__()
        self.channels = config.channels
        self.temporal_stride = self.multiple = config.temporal_stride

    def forward(self, features: Tensor) -> Tensor:
        """Transpose floating-point features `(B, T', C)` to a backbone's layout `(B, C, T')`.

        Raises:
            ValueError: the input holds frames, or has another shape.
        """
        if not features.is_floating_point():
            raise ValueError(TRAINED_ON_FEATURES)
        if features.ndim != 3 or features.shape[2] != self.channels:
            raise ValueError(
                f"Features must be (B, T', {self.channels}), but got {tuple(features.shape)}."
            )
        return features.transpose(1, 2).contiguous()

    def layer_of(self, name: str) -> int:
        """Raise an error, because there are no parameters."""
        raise ValueError(f"Precomputed features have no parameter {name!r}.")
