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

from re2tal.reversible.branches import (
    Branch,
    ByToken,
    Layout,
    Leading,
    add_rows,
    branches,
    has_hooks,
    recomputed,
)

_MASKED = -100.0
"""Added by torchvision to the scores of tokens that the cyclic shift brought together."""


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


@recomputed.register(PatchEmbed3d)
def _stem(module: nn.Module) -> bool:  # noqa: ARG001
    return True


@recomputed.register(PatchMerging)
def _merging(module: nn.Module) -> Leading:  # noqa: ARG001
    # The input and the four that are sliced from it are as large as the input, and so are the norm
    # and the gradients of all; the output is half as large.
    return Leading(inner=3, growth=8)


@dataclass(frozen=True, slots=True)
class Windows:
    """Cut of the attention of a Swin block, with its norm, into windows.

    Attributes:
        norm: norm of every token before the attention.
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
            units=count,
            elements=tokens * (_scores(x.device) * heads * tokens + 12 * x.shape[-1]),
            index=_index(x.shape[0], size, padded, tuple(window), tuple(shift), x.device),
            regions=_regions(padded, tuple(window), tuple(shift), x.device) if any(shift) else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _WindowLayout:
    norm: nn.Module
    attention: Any
    size: tuple[int, ...]
    padded: tuple[int, ...]
    window: tuple[int, ...]
    units: int
    elements: int
    index: Tensor  # (windows, tokens): each token's row in the input, behind its end for padding
    regions: Tensor | None  # (windows of a sample, tokens), if they are shifted: see `_regions`
    contiguous: bool = False

    def share(self) -> tuple[Tensor, ...]:
        """Compute the relative position bias, ``(1, heads, tokens, tokens)``."""
        table, own = self.attention.relative_position_bias_table, self.attention.window_size
        if self.window[1:] == tuple(own[1:]):
            index = self.attention.relative_position_index
            return (RelativeBias.apply(table, index, tuple(own), self.window),)
        # Cut short along another axis than the first, torchvision's index means other offsets.
        return (self.attention.get_relative_position_bias(list(self.window)),)

    def new(self, piece: Tensor, shape: torch.Size) -> Tensor:
        """Make an empty tensor of a shape, with a spare row behind its end if there is padding."""
        if self.padded == self.size:
            return piece.new_empty(shape)
        return piece.new_empty(prod(shape[:-1]) + 1, shape[-1])[:-1].view(shape)

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Gather windows ``(windows, tokens, C)``, zero at padding."""
        index, rows = self.index[start:stop], x.reshape(-1, x.shape[-1])
        if self.padded == self.size:
            return _rows(rows, index)
        inside = index.clamp(max=rows.shape[0] - 1)
        return _rows(rows, inside).masked_fill(self._padding(start, stop), 0)

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Write the windows' tokens to their rows."""
        channels, spare = out.shape[-1], self.padded != self.size
        rows = out.as_strided((out.numel() // channels + spare, channels), (channels, 1))
        rows[self.index[start:stop]] = piece

    def add(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Add the windows' tokens to their rows."""
        add_rows(out, self.index[start:stop], piece, padded=self.padded != self.size)

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
        """Compute the attention within each window of a piece, with a fused kernel on a GPU."""
        attention, (bias,) = self.attention, shared
        x = self.norm(piece)
        if self.padded != self.size:
            x = x.masked_fill(self._padding(start, stop), 0)
        windows, tokens, channels = x.shape
        qkv = attention.qkv(x).view(windows, tokens, 3, attention.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = bias.to(q.dtype)
        if self.regions is not None:
            bias = bias + _mask(self.regions, start, stop, bias)
        dropout = attention.attention_dropout if attention.training else 0.0
        y = _attend(q, k, v, bias, dropout)
        y = y.transpose(1, 2).reshape(windows, tokens, channels)
        return F.dropout(attention.proj(y), attention.dropout, attention.training)


def _mask(regions: Tensor, start: int, stop: int, like: Tensor) -> Tensor:
    """Make the mask ``(windows, 1, tokens, tokens)`` of tokens that were not neighbours."""
    chosen = regions[torch.arange(start, stop, device=regions.device) % regions.shape[0]]
    apart = chosen.unsqueeze(1) != chosen.unsqueeze(2)
    return like.new_zeros(()).masked_fill(apart, _MASKED).unsqueeze(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """Attend, ``(windows, heads, tokens, C / heads)``; fused where the bias gets a gradient."""
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    # Elsewhere it falls back to these matrices, and guards them against rows that are all masked.
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)) + bias
    return torch.matmul(F.dropout(scores.softmax(-1), dropout), v)


def _scores(device: torch.device) -> int:
    """Count the elements alive for each pair of tokens; a fused one is the bias's gradient."""
    return 1 if device.type == "cuda" else 4


def _rows(rows: Tensor, index: Tensor) -> Tensor:
    # Several times as fast as rows[index].
    return rows.index_select(0, index.reshape(-1)).view(*index.shape, -1)


class RelativeBias(torch.autograd.Function):
    """Bias between all pairs of tokens of a window, from the table of offsets.

    The gradient of an offset is the sum over a diagonal of each axis. It is taken with shears,
    axis by axis, many times as fast as the scattered additions of an index, and always in the same
    order.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        table: Tensor, index: Tensor, own: tuple[int, ...], window: tuple[int, ...]
    ) -> Tensor:
        """Look up the bias, ``(1, heads, tokens, tokens)``.

        Args:
            table: ``(offsets, heads)`` over all axes of the module's own window.
            index: ``(tokens, tokens)`` of the own window: the row of each pair.
            own: the module's own window.
            window: the window in use; it may be shorter along the first axis.
        """
        tokens = prod(window)
        pairs = index.view(prod(own), prod(own))[:tokens, :tokens]
        return _rows(table, pairs).permute(2, 0, 1).unsqueeze(0).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        """Only shapes are needed in the backward."""
        *_, ctx.own, ctx.window = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Compute the gradient of the table."""
        own, window = ctx.own, ctx.window
        heads, axes = gradients[0].shape[1], len(window)
        gradient = gradients[0].reshape(heads, *window, *window)
        for axis in range(axes):
            # (heads, offsets so far, queries.., keys..)
            moved = gradient.movedim((1 + axis, 1 + axes), (-2, -1))
            gradient = _sheared_sum(moved).movedim(-1, 1 + axis)
        short = own[0] - window[0]
        gradient = F.pad(gradient, (*(0,) * (2 * axes - 2), short, short))
        return gradient.reshape(heads, -1).t(), None, None, None


def _sheared_sum(pairs: Tensor) -> Tensor:
    """Sum over ``i - j``: ``(..., w, w)`` to ``(..., 2 w - 1)``, from ``1 - w`` to ``w - 1``."""
    w = pairs.shape[-1]
    padded = F.pad(pairs.flip(-1), (0, w)).flatten(-2)
    # Rows of one less than their length: each row starts one place further to the right.
    sums: Tensor = padded[..., :-w].unflatten(-1, (w, 2 * w - 1)).sum(-2)
    return sums


def _index(
    batch: int,
    size: tuple[int, ...],
    padded: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """List the row of each window's tokens, ``(windows, tokens)``; behind the end for padding."""
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
    """Number the parts of the unshifted input in windows: ``(windows of a sample, tokens)``."""
    axes = len(padded)
    region = torch.zeros((1,) * (2 * axes), dtype=torch.int, device=device)
    for axis in range(axes):
        place = torch.arange(padded[axis], device=device)
        part = (place >= padded[axis] - window[axis]).int() + (place >= padded[axis] - shift[axis])
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = padded[axis] // window[axis], window[axis]
        region = region * 3 + part.view(shape)
    return region.reshape(-1, prod(window))
