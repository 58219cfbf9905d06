"""torchvision's Swin Transformers, for images and video: arXiv 2103.14030 and 2106.13230.

The attention of a block is computed window by window with fused attention, so that the attention
matrices of a piece are all that is ever in memory. The windows are gathered by index, which does
torchvision's padding, cyclic shift and partition in one step and only for the piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    PatchMerging,
    ShiftedWindowAttention,
    SwinTransformerBlock,
)
from torchvision.models.video.swin_transformer import PatchEmbed3d, ShiftedWindowAttention3d

from re2tal.reversible.branches import Branch, branches, has_hooks, recomputed
from re2tal.reversible.cuts import ByToken, Layout

_MASKED = -100.0
"""What torchvision adds to the scores of tokens that the cyclic shift brought together."""


@branches.register
def _swin(block: SwinTransformerBlock) -> list[Branch]:
    return [
        Branch(
            "attention",
            (block.norm1, block.attn),
            drop_path=block.stochastic_depth,
            cut=_windows(block),
        ),
        Branch(
            "mlp",
            (block.norm2, block.mlp),
            drop_path=block.stochastic_depth,
            cut=ByToken(5 * block.norm2.normalized_shape[0] + 4 * block.mlp[0].out_features),
        ),
    ]


def _windows(block: SwinTransformerBlock) -> "Windows | None":
    # Cutting goes around the module: one that was replaced, compiled or hooked is called instead.
    attention = block.attn
    if type(attention) not in (ShiftedWindowAttention, ShiftedWindowAttention3d):
        return None
    return None if has_hooks(attention) else Windows(block.norm1, attention)


@recomputed.register(PatchMerging)
@recomputed.register(PatchEmbed3d)
def _between_stages(module: nn.Module) -> bool:  # noqa: ARG001
    return True


@dataclass(frozen=True, slots=True)
class Windows:
    """Cuts the attention of a Swin block, after its norm, into windows.

    Attributes:
        norm: applied to every token before the attention.
        attention: torchvision's module, for images or video.
    """

    norm: nn.Module
    attention: ShiftedWindowAttention | ShiftedWindowAttention3d

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Layout:  # noqa: ARG002
        """Lay out ``(B, [T,] H, W, C)``; a window is a unit."""
        size = tuple(x.shape[1:-1])
        window = list(self.attention.window_size)
        shift = list(self.attention.shift_size)
        for axis, length in enumerate(size):
            if window[axis] >= length:
                # One window along this axis: nothing to shift. For video it shrinks to the input;
                # for images torchvision keeps the window and pads the input.
                shift[axis] = 0
                if len(size) == 3:
                    window[axis] = length
        padded = tuple(-(-n // w) * w for n, w in zip(size, window, strict=True))
        count = x.shape[0] * prod(p // w for p, w in zip(padded, window, strict=True))
        tokens, heads = prod(window), self.attention.num_heads
        return _WindowLayout(
            norm=self.norm,
            attention=self.attention,
            size=size,
            padded=padded,
            window=tuple(window),
            shift=tuple(shift),
            units=count,
            elements=tokens * (4 * heads * tokens + 12 * x.shape[-1]),
            index=_index(x.shape[0], size, padded, tuple(window), tuple(shift), x.device),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _WindowLayout:
    norm: nn.Module
    attention: Any
    size: tuple[int, ...]
    padded: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    units: int
    elements: int
    index: Tensor  # (windows, tokens): each token's row in the input, behind its end for padding
    contiguous: bool = False

    def share(self) -> tuple[Tensor, ...]:
        """The relative position bias, ``(1, heads, tokens, tokens)``."""
        if len(self.size) == 3:
            bias = self.attention.get_relative_position_bias(list(self.window))
        else:
            bias = self.attention.get_relative_position_bias()
        return (bias,)

    def new(self, like: Tensor) -> Tensor:
        """An empty tensor of a shape, with a spare row behind its end for what padding yields."""
        rows = like.new_empty(like.numel() // like.shape[-1] + 1, like.shape[-1])
        return rows[:-1].view(like.shape)

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """``(windows, tokens, C)``, zero at padding."""
        index, rows = self.index[start:stop], x.reshape(-1, x.shape[-1])
        if self.padded == self.size:
            return rows[index]
        last = rows.shape[0] - 1
        return rows[index.clamp(max=last)].masked_fill(self._padding(start, stop), 0)

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Write the windows' tokens to their rows."""
        channels = out.shape[-1]
        rows = out.as_strided((out.numel() // channels + 1, channels), (channels, 1))
        rows[self.index[start:stop]] = piece

    def _padding(self, start: int, stop: int) -> Tensor:
        """``(windows, tokens, 1)``: where a piece is padding."""
        batch = self.units * prod(self.window) // prod(self.padded)
        return (self.index[start:stop] >= batch * prod(self.size)).unsqueeze(-1)

    def run(
        self,
        branch: Any,  # noqa: ARG002
        piece: Tensor,
        start: int,
        stop: int,
        shared: Sequence[Tensor],
    ) -> Tensor:
        """Attention within each window of a piece: torchvision's, with a fused kernel."""
        attention, (bias,) = self.attention, shared
        x = self.norm(piece)
        if self.padded != self.size:
            x = x.masked_fill(self._padding(start, stop), 0)
        windows, tokens, channels = x.shape
        qkv = attention.qkv(x).view(windows, tokens, 3, attention.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = bias.to(q.dtype)
        if any(self.shift):
            bias = bias + self._mask(start, stop, bias)
        dropout = attention.attention_dropout if attention.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(windows, tokens, channels)
        return F.dropout(attention.proj(y), attention.dropout, attention.training)

    def _mask(self, start: int, stop: int, bias: Tensor) -> Tensor:
        """``(windows, 1, tokens, tokens)``: what keeps apart tokens that were not neighbours."""
        regions = _regions(self.padded, self.window, self.shift, bias.device)
        chosen = regions[torch.arange(start, stop, device=bias.device) % regions.shape[0]]
        apart = chosen.unsqueeze(1) != chosen.unsqueeze(2)
        return bias.new_zeros(()).masked_fill(apart, _MASKED).unsqueeze(1)


def _index(
    batch: int,
    size: tuple[int, ...],
    padded: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """The row of every token of every window, ``(windows, tokens)``; one behind the end if none."""
    axes = len(size)
    row = torch.zeros((1,) * (2 * axes), dtype=torch.long, device=device)
    inside = torch.ones((1,) * (2 * axes), dtype=torch.bool, device=device)
    for axis in range(axes):
        place = (torch.arange(padded[axis], device=device) + shift[axis]) % padded[axis]
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = padded[axis] // window[axis], window[axis]
        place = place.view(shape)
        row = row * size[axis] + place
        inside = inside & (place < size[axis])
    sample = torch.arange(batch, device=device).view(-1, *(1,) * (2 * axes)) * prod(size)
    row = torch.where(inside, row + sample, batch * prod(size))
    return row.reshape(-1, prod(window))


def _regions(
    padded: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], device: torch.device
) -> Tensor:
    """Which parts of the unshifted input meet in a window: ``(windows of a sample, tokens)``."""
    axes = len(padded)
    region = torch.zeros((1,) * (2 * axes), dtype=torch.int, device=device)
    for axis in range(axes):
        place = torch.arange(padded[axis], device=device)
        part = (place >= padded[axis] - window[axis]).int() + (place >= padded[axis] - shift[axis])
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = padded[axis] // window[axis], window[axis]
        region = region * 3 + part.view(shape)
    return region.reshape(-1, prod(window))
