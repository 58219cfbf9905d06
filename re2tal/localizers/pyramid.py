"""From features of one rate to a pyramid of features, each level at half the rate of the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.localizers.blocks import Convolution, TransformerBlock, zero_padding


@dataclass(frozen=True, kw_only=True, slots=True)
class Pyramid:
    """Features at several rates.

    Attributes:
        features: of level l `(B, T / 2^l, C)`.
        masks: of level l `(B, T / 2^l)` bool.
    """

    features: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]


class Embedding(nn.Module):
    """Convolutions that bring the backbone's channels to the transformer's width.

    With `streams` the input is several kinds of features side by side, each of which a matrix of
    its own first brings to its share of the width. With `positions` it adds sinusoids of that
    length (Vaswani et al., 2017), divided by the square root of the width; longer sequences
    stretch them.
    """

    positions: Tensor | None

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        streams: Sequence[tuple[int, int]],
        layers: int,
        positions: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.stream_channels = [before for before, _ in streams]
        if streams and sum(self.stream_channels) != in_channels:
            raise ValueError(
                f"The localizer gets features of {in_channels} channels, but its streams "
                f"{tuple(streams)} have {sum(self.stream_channels)} together."
            )
        projections = [nn.Linear(before, after) for before, after in streams]
        for projection in projections:
            nn.init.zeros_(projection.bias)
        self.streams = nn.ModuleList(projections)
        self.drop = nn.Dropout1d(dropout)  # whole channels
        channels = [width if streams else in_channels, *[width] * layers]
        self.convs = nn.ModuleList(
            Convolution(before, after, bias=False)  # the norm has one
            for before, after in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        table = sinusoids(positions, width) / width**0.5 if positions else None
        self.register_buffer("positions", table, persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` `(B, T, C)`, `mask` `(B, T)` to `(B, T, width)`."""
        x = x.masked_fill(~mask[..., None], 0)  # padding may hold anything, NaN too
        if self.streams:
            parts = x.split(self.stream_channels, dim=2)
            joined = [stream(part) for stream, part in zip(self.streams, parts, strict=True)]
            x = zero_padding(torch.cat(joined, dim=2), mask)
        x = self.drop(x.transpose(1, 2)).transpose(1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(zero_padding(conv(x), mask)))
        if self.positions is None:
            return x
        table = self.positions
        if x.shape[1] > table.shape[0]:
            table = F.interpolate(table.t()[None], x.shape[1], mode="linear")[0].t()
        return x + zero_padding(table[None, : x.shape[1]], mask).to(x.dtype)


class TransformerPyramid(nn.Module):
    """ActionFormer's encoder: embedding, stem at full rate, one halving block for each level.

    The masks of level l are every 2^l-th value of the input's. Features of padded steps are those
    of the published model: finite, and the same whatever the padding held. As there, the last
    steps of a video see a little of whether padding follows (it takes the biases of the layer
    norms) or the end of the tensor (zeros), so how much is padded is part of the model.

    Args:
        embed: what comes before the transformer.
        width: of the transformer.
        stem_layers: blocks at full rate.
        windows: of each level the attention's width, 0 for global; the first is the stem's.
        heads: of the attention.
        residual_scale: see `ResidualScale`.
        dropout: see `TransformerBlock`.
        drop_path: see `ResidualScale`.
    """

    def __init__(
        self,
        embed: Embedding,
        width: int,
        *,
        stem_layers: int,
        windows: Sequence[int],
        heads: int,
        residual_scale: float,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()

        def block(window: int, stride: int) -> TransformerBlock:
            return TransformerBlock(
                width,
                heads=heads,
                window=window,
                stride=stride,
                residual_scale=residual_scale,
                dropout=dropout,
                drop_path=drop_path,
            )

        self.embed = embed
        self.stem = nn.ModuleList(block(windows[0], 1) for _ in range(stem_layers))
        self.branch = nn.ModuleList(block(window, 2) for window in windows[1:])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in windows)

    def forward(self, features: Tensor, mask: Tensor) -> Pyramid:
        """Encodes.

        Args:
            features: `(B, C, T)`.
            mask: `(B, T)` bool.

        Returns:
            A level for each window, normalised.

        Raises:
            ValueError: If T is not a multiple of the top level's stride.
        """
        top = 2 ** len(self.branch)
        if features.shape[2] % top:
            raise ValueError(
                f"The localizer got {features.shape[2]} features, but its pyramid of "
                f"{len(self.branch) + 1} levels needs a multiple of {top}: change the window's "
                "length or the number of levels."
            )
        x = self.embed(features.transpose(1, 2), mask)
        for block in self.stem:
            x, mask = block(x, mask)
        levels, masks = [x], [mask]
        for block in self.branch:
            x, mask = block(x, mask)
            levels.append(x)
            masks.append(mask)
        normed = tuple(norm(level) for norm, level in zip(self.norms, levels, strict=True))
        return Pyramid(features=normed, masks=tuple(masks))


def sinusoids(length: int, width: int) -> Tensor:
    """Position encodings `(length, width)`, sine and cosine of a frequency side by side."""
    channel = torch.arange(width, dtype=torch.float64)
    frequency = 10000 ** (-2 * (channel // 2) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()
