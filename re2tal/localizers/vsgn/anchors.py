"""Anchors: the segments that a pyramid's nodes start from, and how predictions move them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What the network predicts is the shift of the centre in tenths of the anchor's length and five
# times the logarithm of how much longer it gets, at most this much.
SHIFT_SCALE = 10.0
GROWTH_SCALE = 5.0
GREATEST_GROWTH = math.log(1000 / 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchors:
    """The A anchors of all levels: level by level, node by node, scale by scale.

    Attributes:
        centres: `(A,)` in feature-grid units; whole numbers.
        lengths: `(A,)` in feature-grid units.
    """

    centres: Tensor
    lengths: Tensor

    @property
    def segments(self) -> Tensor:
        """`(A, 2)` starts and ends."""
        return torch.stack(
            [self.centres - self.lengths / 2, self.centres + self.lengths / 2], dim=1
        )

    def decode(self, regression: Tensor) -> Tensor:
        """Segments in feature-grid units for predictions.

        The centre moves by a tenth of the anchor's length times the first number, the length is
        multiplied by the exponential of a fifth of the second.

        Args:
            regression: `(B, A, 2)` float32.

        Returns:
            `(B, A, 2)` starts and ends, every one of them of positive length.
        """
        centre = self.centres + regression[..., 0] / SHIFT_SCALE * self.lengths
        growth = (regression[..., 1] / GROWTH_SCALE).clamp(max=GREATEST_GROWTH)
        half = growth.exp() * self.lengths / 2
        return torch.stack([centre - half, centre + half], dim=-1)


def make_anchors(
    length: int, strides: Sequence[int], scales: Sequence[float], device: torch.device
) -> Anchors:
    """The anchors over `length` features.

    A node of stride s has anchors of length s times each scale. Their centre is at k s + s / 2 for
    the level's k-th node: half a feature behind the middle of its cell, as in the authors' release.
    """
    centres, lengths = [], []
    for stride in strides:
        node = torch.arange(length // stride, device=device) * stride + stride / 2
        centres.append(node.repeat_interleave(len(scales)))
        lengths.append(stride * torch.tensor(scales, device=device).repeat(length // stride))
    return Anchors(centres=torch.cat(centres), lengths=torch.cat(lengths))


def anchors_of_nodes(levels: Sequence[Tensor], scales: int) -> Tensor:
    """What holds for an anchor because it holds for its node.

    Args:
        levels: of each level `(B, N)`.
        scales: anchors of a node.

    Returns:
        `(B, A)` in the order of `make_anchors`.
    """
    return torch.cat(list(levels), dim=1).repeat_interleave(scales, dim=1)
