"""torchvision's Swin Transformers, for images and video: arXiv 2103.14030 and 2106.13230.

The attention of a block runs on pieces of some windows, so that only the attention matrices of one
piece are in memory. The windows are gathered by index. This does torchvision's padding, cyclic
shift and partition in one step, and only for the piece. Attention is PyTorch's fused kernel on a
GPU, and that of `window_attention` on a CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchvision.models.swin_transformer import (
    PatchMerging,
    ShiftedWindowAttention,
    SwinTransformerBlock,
)
from torchvision.models.video.swin_transformer import PatchEmbed3d, ShiftedWindowAttention3d

from re2tal.reversible.branches import Branch, Leading, branches, has_hooks, recomputed
from re2tal.reversible.coupling import Grid
from re2tal.reversible.families.window_attention import (
    MASKED,
    Offsets,
    RelativeBias,
    WindowAttention,
    attend,
    in_groups,
)
from re2tal.reversible.layouts import ByToken, Layout, Places


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
    # A cut attention bypasses its module's forward, so a module that was replaced, compiled or
    # hooked is called whole instead.
    attention = block.attn
    if type(attention) not in (ShiftedWindowAttention, ShiftedWindowAttention3d):
        return None
    return None if has_hooks(attention) else Windows(block.norm1, attention)


@recomputed.register(PatchEmbed3d)
def _stem(module: nn.Module) -> bool:  # noqa: ARG001
    return True


@recomputed.register(PatchMerging)
def _merging(module: nn.Module) -> Leading:  # noqa: ARG001
    # In sizes of the input: the input, the four slices together, the norm, gradients of these, and
    # the output with half a size.
    return Leading(inner=3, growth=8)


@dataclass(frozen=True, slots=True)
class Windows:
    """Cut of the attention of a Swin block, with its norm, into windows.

    Attributes:
        norm: norm of every token before the attention.
        attention: torchvision's attention module, for images or video.
    """

    norm: nn.Module
    attention: ShiftedWindowAttention | ShiftedWindowAttention3d

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Layout:  # noqa: ARG002
        """Lay out ``(B, [T,] H, W, C)`` with every window as a unit."""
        size = tuple(x.shape[1:-1])
        window = list(self.attention.window_size)
        shift = list(self.attention.shift_size)
        for axis, length in enumerate(size):
            if window[axis] >= length:
                # A single window along this axis needs no shift. As in torchvision, it shrinks to
                # the input for video; for images it keeps its length and the input is padded.
                shift[axis] = 0
                if len(size) == 3:
                    window[axis] = length
        windows = _Windows(x.shape[0], size, tuple(window), tuple(shift), x.device)
        tokens, heads = prod(window), self.attention.num_heads
        # Matrices (tokens, tokens) alive per head: four, or with a fused kernel only the gradient
        # of the bias.
        alive = heads if x.device.type == "cuda" else 4 * heads
        mode = x.fake_mode if isinstance(x, FakeTensor) else None
        return _WindowLayout(
            norm=self.norm,
            attention=self.attention,
            windows=windows,
            kept=(kept := _kept(windows, mode)),
            light=100 * kept.places.index.nbytes <= x.nbytes,  # at most 1 % of a stream
            units=windows.count,
            elements=tokens * (alive * tokens + 12 * x.shape[-1]),
        )


@dataclass(frozen=True, slots=True)
class _Windows:
    """Shape of the windows of an input, which determines their indices and masks.

    Attributes:
        batch: number of samples.
        size: length of each axis, ``([T,] H, W)``.
        window: length of a window along each axis.
        shift: cyclic shift along each axis.
        device: device of the input.
    """

    batch: int
    size: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    device: torch.device

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of windows along each axis."""
        return tuple(-(-n // w) for n, w in zip(self.size, self.window, strict=True))

    @property
    def padded(self) -> tuple[int, ...]:
        """Length of each axis, with padding."""
        return tuple(n * w for n, w in zip(self.counts, self.window, strict=True))

    @property
    def count(self) -> int:
        """Number of windows of all samples."""
        return self.batch * prod(self.counts)


@dataclass(frozen=True, slots=True)
class _Masks:
    """Masks of shifted windows, one for each kind of window.

    The cyclic shift brings tokens from opposite ends of an axis together in the last window along
    it. Windows that are last along the same shifted axes have the same mask: they are of one kind.
    With three axes there are at most 2^3 = 8 kinds.

    Attributes:
        kinds: kind of each window. Kind 0 is last along no shifted axis: nothing to mask.
        index: the same as a tensor.
        regions: ``(kinds, tokens)``, number of the region of the unshifted input that a token
            comes from. Tokens attend to each other within a region only.
        apart: ``(kinds, 1, tokens, tokens)``, true for pairs of tokens from different regions;
            None if that is large, and made for each piece instead.
    """

    kinds: bytes
    index: Tensor
    regions: Tensor
    apart: Tensor | None

    def of(self, start: int, stop: int) -> Tensor | None:
        """Return the masks of windows, ``(windows or 1, 1, n, n)``; None if nothing is masked."""
        here = self.kinds[start:stop]  # bytes on the host: no wait for a GPU
        mixed = here.count(here[0]) < len(here)
        if not mixed and here[0] == 0:
            return None
        kept = self.regions if self.apart is None else self.apart
        if mixed:
            chosen = kept.index_select(0, self.index[start:stop])
        else:
            chosen = kept[here[0] : here[0] + 1]
        return _apart(chosen) if self.apart is None else chosen


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Kept:
    """Row of each token of each window, ``(windows, tokens)``; masks, if there is a shift."""

    places: Places
    masks: _Masks | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _WindowLayout:
    norm: nn.Module
    attention: Any
    windows: _Windows
    kept: _Kept
    light: bool
    units: int
    elements: int
    contiguous: bool = False

    def share(self) -> tuple[Tensor, ...]:
        """Compute the relative position bias, ``(1, heads, tokens, tokens)``.

        For attention by groups of heads return instead the table, ``(heads, offsets)``, and its
        index; see `Offsets`.
        """
        table, own = self.attention.relative_position_bias_table, self.attention.window_size
        window = self.windows.window
        if window[1:] != tuple(own[1:]):
            # For a window that is shorter along another axis than the first, torchvision takes the
            # first rows and columns of its index, which stand for other offsets. Do as it does.
            return (self.attention.get_relative_position_bias(list(window)),)
        index = self.attention.relative_position_index
        if self._plain() or not in_groups(table.shape[1], prod(window)):
            return (RelativeBias.apply(table, index, tuple(own), window),)
        return table.t().contiguous(), Offsets.of_one_place(index, tuple(own))

    def _plain(self) -> bool:
        """Tell whether to use PyTorch's operators, fused on a GPU, instead of `WindowAttention`."""
        drops = self.attention.training and self.attention.attention_dropout > 0
        return (
            self.windows.device.type == "cuda"
            or drops
            or torch._C._are_functorch_transforms_active()
            or torch.compiler.is_exporting()
        )

    def new(self, piece: Tensor, shape: torch.Size) -> Tensor:
        """Make an empty tensor, with a spare row behind its end, to which `put` writes padding."""
        if self.kept.places.padding is None:
            return piece.new_empty(shape)
        return piece.new_empty(prod(shape[:-1]) + 1, shape[-1])[:-1].view(shape)

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Gather windows ``(windows, tokens, C)`` from ``(B, [T,] H, W, C)``, zero at padding."""
        return self.kept.places[start:stop].take(x)

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Write the windows' tokens to their rows."""
        index, padding = self.kept.places.index[start:stop], self.kept.places.padding
        channels, end = out.shape[-1], out.numel() // out.shape[-1]
        if padding is not None:
            index = index.masked_fill(padding[start:stop, ..., 0], end)
        # Reaches the spare row, which is outside of `out` but inside its memory.
        rows = out.as_strided((end + (padding is not None), channels), (channels, 1))
        rows[index] = piece

    def add(
        self,
        out: Tensor,
        start: int,
        stop: int,
        piece: Tensor,
        grid: Grid | None = None,
        sign: int = 1,
    ) -> None:
        """Add the windows' tokens to their rows."""
        self.kept.places[start:stop].add(out, piece, grid, sign)

    def run(
        self,
        branch: Any,  # noqa: ARG002
        piece: Tensor,
        start: int,
        stop: int,
        shared: Sequence[Tensor],
    ) -> Tensor:
        """Compute the attention within each window of a piece, with a fused kernel on a GPU."""
        attention, (bias, *index) = self.attention, shared
        x = self.norm(piece)
        if self.kept.places.padding is not None:
            # torchvision pads after the norm, whose bias would make padding other than zero.
            x = x.masked_fill(self.kept.places.padding[start:stop], 0)
        windows, tokens, channels = x.shape
        qkv = attention.qkv(x).view(windows, tokens, 3, attention.num_heads, -1)
        masks = self.kept.masks
        bias, apart = bias.to(qkv.dtype), None if masks is None else masks.of(start, stop)
        if self._plain():
            # The gradients of views that are unbound here are joined by one operator, in the memory
            # order of `qkv`; with the heads moved first, it would be two.
            q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (windows, heads, tokens, d)
            bias = bias if apart is None else torch.add(bias, apart, alpha=MASKED)
            dropout = attention.attention_dropout if attention.training else 0.0
            attends = F.scaled_dot_product_attention if q.is_cuda else attend
            y = attends(q, k, v, bias, dropout).transpose(1, 2)
        else:
            own, window = tuple(attention.window_size), self.windows.window
            offsets = Offsets(own, window, *index) if index else None
            y = WindowAttention.apply(qkv, bias, offsets, apart)
        y = attention.proj(y.reshape(windows, tokens, channels))
        return F.dropout(y, attention.dropout, attention.training)


_LARGE_MASKS = 2**20
"""Bytes of all masks from which on a CPU makes them for each piece."""

_KEPT: WeakValueDictionary[tuple[_Windows, FakeTensorMode | None], _Kept] = WeakValueDictionary()


@torch.inference_mode(False)
def _kept(windows: _Windows, mode: FakeTensorMode | None) -> _Kept:
    """Return the indices and masks of windows, shared by all layouts that are alive.

    They take eight bytes a token. If that is at most 1 % of a stream, steps keep their layouts, and
    with them this cache's entries, until the backward.

    Args:
        windows: shape of the windows.
        mode: mode of fake tensors, which must not mix with others.
    """
    found = _KEPT.get((windows, mode))
    if found is None:
        masks = _masks(windows) if any(windows.shift) else None
        found = _KEPT[windows, mode] = _Kept(_places(windows), masks)
    return found


def _places(windows: _Windows) -> Places:
    """List the row of each token of each window, ``(windows, tokens)``.

    A token at place ``p`` of an axis of the shifted, padded input was at ``(p + shift) % padded``.
    Its row in ``(B * [T *] H * W, C)`` is the usual row-major number of its places.
    """
    axes, device = len(windows.size), windows.device
    row = torch.zeros((1,) * (2 * axes), dtype=torch.long, device=device)
    inside = torch.ones((1,) * (2 * axes), dtype=torch.bool, device=device)
    for axis, (size, padded) in enumerate(zip(windows.size, windows.padded, strict=True)):
        place = (torch.arange(padded, device=device) + windows.shift[axis]) % padded
        place = _along(windows, axis, place)
        row = row * size + place  # broadcasts over all axes: windows, then places in these
        inside = inside & (place < size)
    end = windows.batch * prod(windows.size)
    sample = torch.arange(windows.batch, device=device).view(-1, *(1,) * (2 * axes))
    row = torch.where(inside, row + sample * prod(windows.size), end)
    row = row.reshape(-1, prod(windows.window))
    return Places(row) if windows.padded == windows.size else Places.behind(row, end)


def _masks(windows: _Windows) -> _Masks:
    """Make the masks of each kind of window.

    Along a shifted axis of the padded length ``n``, torchvision's regions are the slices
    ``[0, n - window)``, ``[n - window, n - shift)`` and ``[n - shift, n)``.
    """
    device = windows.device
    axes = range(len(windows.size))
    # Number of the region of each token: finally (windows of a sample, tokens).
    region = torch.zeros((1,) * (2 * len(axes)), dtype=torch.int, device=device)
    for axis, (size, window, shift) in enumerate(
        zip(windows.padded, windows.window, windows.shift, strict=True)
    ):
        place = torch.arange(size, device=device)
        part = (place >= size - window).int() + (place >= size - shift)
        region = region * 3 + _along(windows, axis, part)
    region = region.reshape(-1, prod(windows.window))
    last = [
        tuple(windows.shift[axis] > 0 and at[axis] == windows.counts[axis] - 1 for axis in axes)
        for at in product(*map(range, windows.counts))
    ]
    numbers = {kind: number for number, kind in enumerate(sorted(set(last)))}
    kinds = bytes(numbers[kind] for kind in last)
    # Of the first window of each kind: (kinds, tokens).
    region = region[[kinds.index(number) for number in range(len(numbers))]]
    kinds *= windows.batch
    index = torch.tensor(list(kinds), device=device)
    small = device.type == "cuda" or len(region) * region.shape[1] ** 2 < _LARGE_MASKS
    return _Masks(kinds, index, region, _apart(region) if small else None)


def _apart(regions: Tensor) -> Tensor:
    return (regions.unsqueeze(1) != regions.unsqueeze(2)).unsqueeze(1)


def _along(windows: _Windows, axis: int, places: Tensor) -> Tensor:
    """Reshape numbers along one axis to broadcast over ``(windows of axes..., places of axes...)``.

    The number of place ``p`` goes to window ``p // window`` and place ``p % window`` in it.
    """
    axes = len(windows.size)
    shape = [1] * (2 * axes)
    shape[axis], shape[axes + axis] = windows.counts[axis], windows.window[axis]
    return places.view(shape)
