"""Masked layers of localizers, most of them on `(B, T, C)` with a mask `(B, T)`.

ActionFormer's temporal transformer; embedding, pyramid and heads of ActionFormer and TriDet; the
group normalisation of TriDet and VSGN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

# Up to this length, dense attention with a band mask is faster than blocks (CPU and GPU).
DENSE_LENGTH = 128


def local_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, window: int) -> Tensor:
    """Attend from each time step to the valid steps near it, by scaled dot products.

    Step i attends to the valid steps j with `|i - j| <= window // 2`, and always to itself. Results
    at padded steps are therefore finite, but meaningless.

    Args:
        query: `(B, H, T, D)`.
        key: `(B, H, T, D)`.
        value: `(B, H, T, D)`.
        mask: `(B, T)` bool, true at valid steps.
        window: an odd width, or 0 to attend to all valid steps.

    Returns:
        `(B, H, T, D)`.
    """
    length = query.shape[2]
    reach = length if window == 0 else window // 2
    if window == 0 or length <= max(DENSE_LENGTH, 2 * window):
        step = torch.arange(length, device=query.device)
        allowed = _allowed(step[:, None], step[None, :], mask[:, None, :], reach)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None])
    return _attention_in_blocks(query, key, value, mask, reach)


def _allowed(query_step: Tensor, key_step: Tensor, key_mask: Tensor, reach: int) -> Tensor:
    distance = query_step - key_step
    return ((distance.abs() <= reach) & key_mask) | (distance == 0)


def _attention_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, reach: int
) -> Tensor:
    """Attend in O(T x window): blocks of queries to the keys in the block and around it.

    A block of n queries is computed against n + 2 reach keys, of which each query uses 2 reach + 1:
    half of them with n = 2 reach.
    """
    batch, heads, length, size = query.shape
    block = max(2 * reach, 32)  # tiny blocks do not fill a kernel
    count = -(-length // block)  # rounded up
    tail = count * block - length
    span = block + 2 * reach

    def around(x: Tensor, steps: int) -> Tensor:
        """Cut `(..., T, D)` into `(..., count, span, D)`, from `reach` steps before each block."""
        padded = F.pad(x, (0, 0, reach, reach + tail))
        return padded.unfold(steps, span, block).transpose(-1, -2)

    queries = F.pad(query, (0, 0, 0, tail)).view(batch, heads, count, block, size)
    # SDPA wants four dimensions for its fused kernels: (B x count, H, steps, D).
    queries = queries.transpose(1, 2).flatten(0, 1)
    keys = around(key, 2).transpose(1, 2).flatten(0, 1)
    values = around(value, 2).transpose(1, 2).flatten(0, 1)
    key_mask = around(mask[..., None], 1)[..., 0].flatten(0, 1)[:, None, :]
    # Query i of a block sits at key i + reach, because the keys begin `reach` steps earlier.
    query_step = torch.arange(block, device=query.device)[:, None] + reach
    key_step = torch.arange(span, device=query.device)[None, :]
    allowed = _allowed(query_step, key_step, key_mask, reach)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed[:, None])
    out = out.view(batch, count, heads, block, size).transpose(1, 2)
    return out.reshape(batch, heads, count * block, size)[:, :, :length]


def zero_padding(x: Tensor, mask: Tensor, *, channels: int = -1) -> Tensor:
    """Put zeros into finite `x` where a mask is false.

    Args:
        x: `(B, T, C)`, or `(B, C, T)` if `channels` is 1.
        mask: `(B, T)` bool.
        channels: dimension of the channels.
    """
    # several times as fast as masked_fill on a CPU
    return x * mask.unsqueeze(channels).to(x.dtype)


class MaskedGroupNorm(nn.GroupNorm):
    """Group normalisation without padding in its statistics; padded steps become zero."""

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise `x` `(B, C, N)` where `valid` `(B, N)`, to float32 of the same shape."""
        groups = x.float().unflatten(1, (self.num_groups, -1))  # (B, G, C / G, N)
        inside = valid[:, None, None].to(groups.dtype)  # (B, 1, 1, N)
        count = (inside.sum(dim=3, keepdim=True) * groups.shape[2]).clamp(min=1)
        mean = (groups * inside).sum(dim=(2, 3), keepdim=True) / count
        centred = (groups - mean) * inside
        variance = centred.square().sum(dim=(2, 3), keepdim=True) / count
        normed = (centred * (variance + self.eps).rsqrt()).flatten(1, 2)
        scaled = normed * self.weight[:, None] + self.bias[:, None]
        return zero_padding(scaled, valid, channels=1)


class Convolution(nn.Conv1d):
    """Convolution of kernel 3 over the time of `(B, T, C)`, which keeps the length."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `(B, T, C)` to `(B, T, C')`."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class DepthwiseConvolution(nn.Module):
    """Depthwise convolution of odd `kernel` over the time of `(B, T, C)`, with a stride.

    With stride 2, step i of the output sits at step 2i of the input.
    """

    def __init__(
        self, channels: int, *, stride: int = 1, kernel: int = 3, bias: bool = False
    ) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as in torch.nn.Conv1d

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `(B, T, C)` to `(B, T / stride, C)`."""
        # An image of height 1 in channels-last layout: `x` is not copied, and depthwise kernels
        # are up to five times faster in this layout on a CPU.
        image = x.transpose(1, 2).unsqueeze(2)
        weight = self.weight.unsqueeze(2)
        groups, _, kernel = self.weight.shape
        padding = (0, kernel // 2)
        out = F.conv2d(image, weight, self.bias, (1, self.stride), padding, groups=groups)
        return out.squeeze(2).transpose(1, 2)


class ConvAttention(nn.Module):
    """Local self-attention after a depthwise convolution of queries, keys and values.

    The convolutions replace position encodings, and downsample the sequence when `stride` is 2
    (Zhang et al., ECCV 2022, section 3.2).
    """

    def __init__(
        self, channels: int, *, heads: int, window: int, stride: int, dropout: float
    ) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.query_conv = DepthwiseConvolution(channels, stride=stride)
        self.query_norm = nn.LayerNorm(channels)
        self.key_conv = DepthwiseConvolution(channels, stride=stride)
        self.key_norm = nn.LayerNorm(channels)
        self.value_conv = DepthwiseConvolution(channels, stride=stride)
        self.value_norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend within each sequence.

        Args:
            x: `(B, T, C)`.
            mask: `(B, T / stride)` mask of the output.

        Returns:
            `(B, T / stride, C)`, zero where padded.
        """
        # Padded steps need no zeros here: no valid step attends to them, and their own results
        # are zeroed below.
        query = self.query(self.query_norm(self.query_conv(x)))
        key = self.key(self.key_norm(self.key_conv(x)))
        value = self.value(self.value_norm(self.value_conv(x)))
        attended = local_attention(
            self._split(query), self._split(key), self._split(value), mask, self.window
        )
        return zero_padding(self.drop(self.proj(attended.transpose(1, 2).flatten(2))), mask)

    def _split(self, x: Tensor) -> Tensor:
        """Split `(B, T, C)` into heads, `(B, heads, T, C / heads)`."""
        heads: Tensor = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return heads


class ResidualScale(nn.Module):
    """End of a residual branch: a learnt factor per channel, and stochastic depth per sample.

    The factors start near zero, so a deep network starts near the identity (LayerScale, Touvron et
    al., ICCV 2021).
    """

    def __init__(self, channels: int, *, initial: float, drop_path: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), initial))
        self.drop = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        """Scale `(B, T, C)`."""
        dropped: Tensor = self.drop(x * self.scale)
        return dropped


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: local attention, then an MLP four times as wide.

    With `stride` 2 the block halves the sequence: the attention in its convolutions, the skip
    connection by a maximum over three steps. `dropout` applies to the attention's output and to
    both layers of the MLP.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        window: int,
        stride: int,
        residual_scale: float,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.ln1 = nn.LayerNorm(channels)
        self.attn = ConvAttention(
            channels, heads=heads, window=window, stride=stride, dropout=dropout
        )
        self.scale_attn = ResidualScale(channels, initial=residual_scale, drop_path=drop_path)
        self.ln2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * channels, channels),
            nn.Dropout(dropout),
        )
        self.scale_mlp = ResidualScale(channels, initial=residual_scale, drop_path=drop_path)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map `x` `(B, T, C)`, `mask` `(B, T)` to the same for `T / stride`, zero where padded."""
        skip = x
        if self.stride > 1:
            mask = mask[:, :: self.stride]
            skip = F.max_pool1d(x.transpose(1, 2), 3, self.stride, padding=1).transpose(1, 2)
        x = zero_padding(skip, mask) + self.scale_attn(self.attn(self.ln1(x), mask))
        return x + self.scale_mlp(zero_padding(self.mlp(self.ln2(x)), mask)), mask


@dataclass(frozen=True, kw_only=True, slots=True)
class Pyramid:
    """Features at several rates.

    Attributes:
        features: features of level l, `(B, T / 2^l, C)`.
        masks: masks of level l, `(B, T / 2^l)` bool.
    """

    features: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]


class Embedding(nn.Module):
    """Convolutions that project the backbone's channels to the transformer's width.

    With `streams` the input holds several kinds of features side by side; each is first projected
    to its share of the width by its own matrix. With `positions`, sinusoids of that length are
    added (Vaswani et al., 2017), divided by the square root of the width and interpolated for
    longer sequences. With `zero_padded`, padded steps stay zero after each layer; otherwise they
    take the biases of the layer norms, as in ActionFormer's public implementation.
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
        zero_padded: bool = False,
    ) -> None:
        super().__init__()
        self.zero_padded = zero_padded
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
        """Embed `x` `(B, T, C)`, with `mask` `(B, T)`, as `(B, T, width)`."""
        x = x.masked_fill(~mask[..., None], 0)  # not by a product: padding may be NaN
        if self.streams:
            parts = x.split(self.stream_channels, dim=2)
            joined = [stream(part) for stream, part in zip(self.streams, parts, strict=True)]
            x = zero_padding(torch.cat(joined, dim=2), mask)
        x = self.drop(x.transpose(1, 2)).transpose(1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(zero_padding(conv(x), mask)))
            x = zero_padding(x, mask) if self.zero_padded else x
        if self.positions is None:
            return x
        table = self.positions
        if x.shape[1] > table.shape[0]:
            table = F.interpolate(table.t()[None], x.shape[1], mode="linear")[0].t()
        return x + zero_padding(table[None, : x.shape[1]], mask).to(x.dtype)


class HalvingPyramid(nn.Module):
    """Encoder: embedding, stem at full rate, then one block per further level, of half the rate.

    The mask of level l is every 2^l-th value of the input's mask.

    Args:
        embed: embedding of the features.
        width: channels of the levels.
        stem: blocks at full rate, from `(B, T, C)` and `(B, T)` to the same.
        branch: blocks that halve the rate.
    """

    def __init__(
        self,
        embed: Embedding,
        width: int,
        *,
        stem: Iterable[nn.Module],
        branch: Iterable[nn.Module],
    ) -> None:
        super().__init__()
        self.embed = embed
        self.stem = nn.ModuleList(stem)
        self.branch = nn.ModuleList(branch)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(len(self.branch) + 1))

    def forward(self, features: Tensor, mask: Tensor) -> Pyramid:
        """Encode features as a pyramid.

        Args:
            features: `(B, C, T)`.
            mask: `(B, T)` bool.

        Returns:
            The normalised pyramid, with one level more than `branch` has blocks.

        Raises:
            ValueError: if T is not a multiple of the top level's stride.
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
    """Make position encodings `(length, width)`, sine and cosine of a frequency side by side."""
    channel = torch.arange(width, dtype=torch.float64)
    frequency = 10000 ** (-2 * (channel // 2) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """All levels of a pyramid one after the other, with a zero after each.

    As long as these gaps are kept zero, one convolution of kernel 3 over the strip equals separate
    convolutions over the levels.

    Attributes:
        features: `(B, S, C)`, where S is the sum of the levels' lengths, plus one for each level.
        valid: `(B, S)` bool, false on padding and gaps.
        inside: `(S,)` bool, false on gaps.
        points: `(P,)` positions in the strip that are not gaps, level by level.
    """

    features: Tensor
    valid: Tensor
    inside: Tensor
    points: Tensor

    @staticmethod
    def lay_out(pyramid: Pyramid) -> Strip:
        """Lay out a pyramid."""
        features = torch.cat([F.pad(level, (0, 0, 0, 1)) for level in pyramid.features], dim=1)
        valid = torch.cat([F.pad(mask, (0, 1)) for mask in pyramid.masks], dim=1)
        inside = torch.cat(
            [F.pad(torch.ones_like(mask[0]), (0, 1)) for mask in pyramid.masks], dim=0
        )
        starts, position = [], 0
        for mask in pyramid.masks:
            starts.append(torch.arange(position, position + mask.shape[1], device=mask.device))
            position += mask.shape[1] + 1
        return Strip(features=features, valid=valid, inside=inside, points=torch.cat(starts))


class ConvHead(nn.Module):
    """Head shared by all levels: convolutions, all but the last with layer norm and ReLU."""

    def __init__(self, in_channels: int, width: int, out_channels: int, *, layers: int) -> None:
        super().__init__()
        channels = [in_channels, *[width] * (layers - 1)]
        self.convs = nn.ModuleList(
            Convolution(before, after, bias=False)  # the norm has one
            for before, after in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers - 1))
        self.last = Convolution(channels[-1], out_channels, bias=True)

    def forward(self, strip: Strip) -> Tensor:
        """Predict `(B, P, out_channels)` float32 for the points of all levels."""
        x = strip.features
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(zero_padding(conv(x), strip.valid)))
            x = zero_padding(x, strip.inside)
        predicted: Tensor = self.last(x).index_select(1, strip.points)
        return predicted.float()


class LevelScale(nn.Module):
    """Learnt factor for each level, because one head predicts distances of all scales."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(levels))

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Scale `x` `(B, P, C)`, whose levels have `lengths` points."""
        parts = x.split(list(lengths), dim=1)
        return torch.cat([part * scale for part, scale in zip(parts, self.scale, strict=True)], 1)
