"""What a localizer is: temporal features in, losses or detections out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from re2tal.detection.segments import Detections

Losses = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The actions of one window.

    Attributes:
        segments: `(N, 2)` float32 `[start, end]` in feature-grid units (feature j sits at j).
        labels: `(N,)` int64 class indices.
    """

    segments: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        count = self.labels.shape[0] if self.labels.ndim == 1 else -1
        if self.segments.shape != (count, 2):
            raise ValueError(
                f"Targets need segments (N, 2) and labels (N,), but got "
                f"{tuple(self.segments.shape)} and {tuple(self.labels.shape)}."
            )

    def to(self, device: torch.device | str) -> Targets:
        """A copy on `device` (itself when it is there already)."""
        return Targets(segments=self.segments.to(device), labels=self.labels.to(device))


class Localizer(Protocol):
    """Finds actions in temporal features. A `torch.nn.Module` in practice.

    Attributes:
        num_classes: labels are 0 to `num_classes - 1`.
    """

    num_classes: int

    def __call__(
        self, features: Tensor, mask: Tensor, targets: Sequence[Targets] | None = None
    ) -> Losses | list[Detections]:
        """Losses against `targets`, or detections without them.

        Args:
            features: `(B, C, T)` features.
            mask: `(B, T)` bool, true where a feature is of the video and not padding. Padded
                features must not influence the result, whatever they hold.
            targets: of each sample its actions.

        Returns:
            With targets: scalar loss terms, whose sum is to be minimised. Without: of each sample
            the detections in feature-grid units, before non-maximum suppression.
        """
        ...
