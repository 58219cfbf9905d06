"""The blocks of a masked temporal transformer, all on `(B, T, C)` with a mask `(B, T)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from re2tal.localizers.attention import local_attention


def zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """Finite `x` `(B, T, C)` with zeros where `mask` `(B, T)` is false."""
    return x * mask[..., None].to(x.dtype)  # several times as fast as masked_fill on a CPU


class Convolution(nn.Conv1d):
    """A convolution of kernel 3 over the time of `(B, T, C)`, without change of length."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C')`."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class DepthwiseConvolution(nn.Module):
    """One filter of kernel 3 a channel over the time of `(B, T, C)`, with a stride.

    With stride 2 the output's step i sits at the input's step 2i.
    """

    def __init__(self, channels: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(channels, 1, 3))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as in torch.nn.Conv1d

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T / stride, C)`."""
        # As an image of height 1 whose channels come last, `x` needs no copy; depthwise kernels
        # are up to five times faster in this layout on a CPU.
        image = x.transpose(1, 2).unsqueeze(2)
        weight = self.weight.unsqueeze(2)
        groups = self.weight.shape[0]
        out = F.conv2d(image, weight, None, (1, self.stride), (0, 1), groups=groups)
        return out.squeeze(2).transpose(1, 2)


class ConvAttention(nn.Module):
    """Local self-attention whose queries, keys and values are first convolved depthwise.

    The convolutions say where a feature is, in place of position encodings, and thin the sequence
    out when `stride` is 2 (Zhang et al., ECCV 2022, section 3.2).
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
        """Attends.

        Args:
            x: `(B, T, C)`.
            mask: `(B, T / stride)`, that of the output.

        Returns:
            `(B, T / stride, C)`, zero where padded.
        """
        # Padded steps need no zeros here: no valid step attends to them, and their own result is
        # left out below.
        query = self.query(self.query_norm(self.query_conv(x)))
        key = self.key(self.key_norm(self.key_conv(x)))
        value = self.value(self.value_norm(self.value_conv(x)))
        attended = local_attention(
            self._split(query), self._split(key), self._split(value), mask, self.window
        )
        return zero_padding(self.drop(self.proj(attended.transpose(1, 2).flatten(2))), mask)

    def _split(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, heads, T, C / heads)`."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class ResidualScale(nn.Module):
    """What ends a residual branch: a learnt factor a channel, and stochastic depth a sample.

    The factors start near zero so that a deep network starts near the identity (LayerScale,
    Touvron et al., ICCV 2021).
    """

    def __init__(self, channels: int, *, initial: float, drop_path: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), initial))
        self.drop = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to the same shape."""
        dropped: Tensor = self.drop(x * self.scale)
        return dropped


class TransformerBlock(nn.Module):
    """A pre-norm transformer block: local attention, then an MLP four times as wide.

    With `stride` 2 it halves the sequence: attention does so in its convolutions, the skip
    connection by a maximum over three steps. `dropout` is that of the attention's output and of
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
        """`x` `(B, T, C)`, `mask` `(B, T)` to the same for `T / stride`; zero where padded."""
        skip = x
        if self.stride > 1:
            mask = mask[:, :: self.stride]
            skip = F.max_pool1d(x.transpose(1, 2), 3, self.stride, padding=1).transpose(1, 2)
        x = zero_padding(skip, mask) + self.scale_attn(self.attn(self.ln1(x), mask))
        return x + self.scale_mlp(zero_padding(self.mlp(self.ln2(x)), mask)), mask
