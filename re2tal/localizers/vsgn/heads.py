"""The heads that all levels share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.vsgn.geometry import zero_padding


class MaskedGroupNorm(nn.GroupNorm):
    """Group normalisation whose statistics leave padding out; its results there are zero."""

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """`x` `(B, C, N)`, `valid` `(B, N)` bool to float32 of the same shape."""
        groups = x.float().unflatten(1, (self.num_groups, -1))  # (B, G, C / G, N)
        inside = valid[:, None, None].to(groups.dtype)
        count = (inside.sum(dim=3, keepdim=True) * groups.shape[2]).clamp(min=1)
        mean = (groups * inside).sum(dim=(2, 3), keepdim=True) / count
        centred = (groups - mean) * inside
        variance = centred.square().sum(dim=(2, 3), keepdim=True) / count
        normed = (centred * (variance + self.eps).rsqrt()).flatten(1, 2)
        return zero_padding(normed * self.weight[:, None] + self.bias[:, None], valid)


class Head(nn.Module):
    """`layers` convolutions with group norm and ReLU, and one that predicts.

    Args:
        width: channels of the features and of the layers.
        per_anchor: numbers that are predicted for an anchor.
        anchors: of a node.
        layers: convolutions before the last.
        groups: of the group norm.
    """

    def __init__(
        self, width: int, per_anchor: int, *, anchors: int, layers: int, groups: int
    ) -> None:
        super().__init__()
        self.per_anchor = per_anchor
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(layers))
        self.norms = nn.ModuleList(MaskedGroupNorm(groups, width) for _ in range(layers))
        self.last = nn.Conv1d(width, anchors * per_anchor, 3, padding=1)

    def forward(self, levels: Sequence[Tensor], valid: Sequence[Tensor]) -> Tensor:
        """Predicts for the A anchors of all levels, in the order of `make_anchors`.

        Args:
            levels: of each level features `(B, width, N)`, zero where padded.
            valid: of each level `(B, N)` bool.

        Returns:
            `(B, A, per_anchor)` float32.
        """
        predicted = torch.cat(
            [self._level(x, inside) for x, inside in zip(levels, valid, strict=True)], dim=2
        )
        return predicted.float().transpose(1, 2).unflatten(2, (-1, self.per_anchor)).flatten(1, 2)

    def _level(self, x: Tensor, valid: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x), valid))
        predicted: Tensor = self.last(x)
        return predicted
