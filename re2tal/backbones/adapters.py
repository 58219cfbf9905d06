"""AdaTAD's temporal adapters (Liu et al., CVPR 2024, arXiv 2311.17241) in the blocks of a backbone.

A block with an adapter returns, for the result z of its own forward,

    y = z + g U(h + P(D(h))),    h = gelu(V(z))

with linear layers V (C to C/4), P (C/4 to C/4) and U (C/4 to C), a depthwise convolution D of
width 3 along all time steps of the *window*, and a learnt gate g. U is zero at the start, so new
adapters do not change the output of a backbone at all.

In a reversible stage the adapter is not a branch of its own but a part of the block's last branch,
F(x) = M(x) + A(x + M(x)), with the MLP M and the adapter's term A. A separate branch, even one that
adds zero, would swap the two streams and so change the function: the zero start would be lost. As a
part of F, the adapter does not change the number of branches, the coupling or its inverse, and for
(alpha, beta) = (1, 0) the block computes y above. No further memory is needed: MLP and adapter
treat all places of a picture alike, so the branch is cut by places, each with all its time steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.backbones.clips import Timeline
from re2tal.backbones.protocol import BackboneConfig
from re2tal.errors import UserError, check_within, shortened
from re2tal.reversible.branches import Branch, branches, returned, split
from re2tal.reversible.coupling import Grid as Points
from re2tal.reversible.layouts import ByToken, Layout, Places
from re2tal.reversible.rewire import reversible_blocks
from re2tal.weights import without_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Shape of the temporal adapters, one in each block.

    Attributes:
        ratio: ratio of a block's channels to the hidden channels of its adapter.
        width: kernel size of an adapter's temporal convolution, odd.
    """

    ratio: int = 4
    width: int = 3

    def __post_init__(self) -> None:
        check_within(self, ratio=(1, 2**14), width=(1, 2**10 - 1))
        if self.width % 2 == 0:
            raise ValueError(
                f"AdapterConfig.width must be odd, so that the kernel is centred, but is "
                f"{self.width}."
            )

    def add_to(self, backbone: nn.Module) -> list[nn.Module]:
        """Add an adapter to each residual block of a backbone, in place.

        Returns:
            The adapters.

        Raises:
            UserError: a block cannot have one, or the backbone has no blocks.
        """
        timeline = getattr(backbone, "timeline", None)
        blocks = reversible_blocks(backbone)
        if not blocks:
            raise UserError(
                f"--model.tuning adapters: no residual block of this {type(backbone).__name__} is "
                "known, so there is no place for an adapter."
            )
        added: list[nn.Module] = []
        for name, block in blocks.items():
            last = split(block)[-1]
            if last.activation is not None:
                raise UserError(
                    f"--model.tuning adapters: {name} ({type(block).__name__}) has an activation "
                    "after its addition; adapters are made for transformer blocks. Use "
                    "--model.tuning full or frozen."
                )
            adapter = TemporalAdapter(_channels(name, last), self, timeline)
            block.add_module("adapter", adapter)
            block.__class__ = _with_adapter(type(block))
            added.append(adapter)
        return added


def _channels(name: str, last: Branch) -> int:
    """Return the channels of a block: the output of its last linear layer."""
    layers = [m for top in last.modules for m in top.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise UserError(f"--model.tuning adapters: the last branch of {name} has no linear layer.")
    return layers[-1].out_features


class TemporalAdapter(nn.Module):
    """Adapter's term, which is added to the result of a block.

    Args:
        channels: C of the block.
        config: shape.
        timeline: order of the block's tokens in time; None for tokens `(B, T, H, W, C)`.
    """

    def __init__(self, channels: int, config: AdapterConfig, timeline: Timeline | None) -> None:
        super().__init__()
        inner = max(1, channels // config.ratio)
        self.channels = channels
        self.timeline = timeline
        self.down = nn.Linear(channels, inner)
        self.temporal = nn.Conv1d(
            inner, inner, config.width, padding=config.width // 2, groups=inner
        )
        self.mix = nn.Linear(inner, inner)
        self.up = nn.Linear(inner, channels)
        self.gate = nn.Parameter(torch.ones(1))  # (1,): FSDP cannot shard a 0-dimensional tensor
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.normal_(self.temporal.weight, std=(2 / config.width) ** 0.5)
        nn.init.normal_(self.mix.weight, std=(2 / inner) ** 0.5)
        nn.init.zeros_(self.up.weight)
        for layer in (self.down, self.temporal, self.mix, self.up):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the term for places `(n, T, C)`, each with all time steps of its window."""
        hidden = F.gelu(self.down(x))  # (n, T, C / ratio)
        mixed = self.mix(self.temporal(hidden.transpose(1, 2)).transpose(1, 2))
        result: Tensor = self.up(hidden + mixed) * self.gate
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grid:
    """Places and times of the tokens of windows, whose clips follow one another in the batch.

    Attributes:
        windows: number of windows.
        places: number of places in a time step.
        timeline: clips of a window, and the order of the tokens in each.
    """

    windows: int
    places: int
    timeline: Timeline

    @classmethod
    def of(cls, shape: Sequence[int], timeline: Timeline | None) -> _Grid:
        """Derive the grid from the shape of the tokens.

        Raises:
            UserError: the shape does not determine it.
        """
        if timeline is None and len(shape) == 5:
            return cls(
                windows=shape[0], places=shape[2] * shape[3], timeline=Timeline(steps=shape[1])
            )
        if timeline is not None and len(shape) == 3:
            places, rest = divmod(shape[1] - timeline.first, timeline.steps)
            if rest == 0 and shape[0] % timeline.clips == 0:
                return cls(windows=shape[0] // timeline.clips, places=places, timeline=timeline)
        raise UserError(
            f"--model.tuning adapters: blocks of this backbone get tokens {tuple(shape)}, whose "
            "times are unknown: adapters are for (B, T, H, W, C), and for tokens of clips. "
            "Use --model.tuning lora."
        )

    @property
    def steps(self) -> int:
        """Time steps of a window, T."""
        return self.timeline.clips * self.timeline.steps

    @property
    def columns_a_window(self) -> int:
        """Number of columns of a window: its places, and the class tokens (`first`) of a clip."""
        return self.places + self.timeline.first

    def columns(self, x: Tensor) -> Tensor:
        """Return tokens as places with all their time steps, `(windows places, T, C)`."""
        line = self.timeline
        # (windows, clips, tokens of a clip, C), without class tokens
        tokens = x.reshape(self.windows, line.clips, -1, x.shape[-1])[:, :, line.first :]
        if line.by_place:
            by_place = tokens.unflatten(2, (self.places, line.steps)).transpose(1, 2)
        else:
            by_place = tokens.unflatten(2, (line.steps, self.places)).permute(0, 3, 1, 2, 4)
        columns: Tensor = by_place.reshape(-1, self.steps, x.shape[-1])
        return columns

    def tokens(self, columns: Tensor, shape: Sequence[int]) -> Tensor:
        """Invert `columns`: return places as tokens of a shape, zero at class tokens."""
        line = self.timeline
        # (windows, places, clips, steps, C)
        by_place = columns.view(self.windows, self.places, line.clips, line.steps, -1)
        order = (0, 2, 1, 3, 4) if line.by_place else (0, 2, 3, 1, 4)
        tokens = by_place.permute(order).flatten(2, 3)
        padded: Tensor = F.pad(tokens, (0, 0, line.first, 0)).reshape(shape)
        return padded

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Compute the row of each token of the columns start to stop - 1, `(n, T)`.

        A class token's column holds it at the first step of each clip. At its other steps there is
        padding, whose row is one after the last.
        """
        line, a_window = self.timeline, self.columns_a_window
        a_clip = line.first + line.steps * self.places
        unit = torch.arange(start, stop, device=device)[:, None]
        window, place = unit // a_window, unit % a_window
        time = torch.arange(self.steps, device=device)
        clip, step = time // line.steps, time % line.steps
        inside = place * line.steps + step if line.by_place else step * self.places + place
        # first row of the clip of each (column, time)
        begin = (window * line.clips + clip) * a_clip
        rows = begin + line.first + inside
        if line.first == 0:
            return rows
        end = self.windows * line.clips * a_clip
        of_none = torch.where(step == 0, begin + place - self.places, end)
        return torch.where(place < self.places, rows, of_none)


class Adapted(nn.Module):
    """Residual block with an adapter: base class of the classes that `_with_adapter` makes.

    Attributes:
        original: class of the block.
        adapter: the adapter.
    """

    original: ClassVar[type[nn.Module]]
    adapter: TemporalAdapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the block's own forward, and add the adapter's term to the tokens in its result."""
        result = super().forward(x, *args, **kwargs)
        z, *rest = result if isinstance(result, tuple) else (result,)
        grid = _Grid.of(z.shape, self.adapter.timeline)
        y = z + grid.tokens(self.adapter(grid.columns(z)), z.shape)
        return (y, *rest) if isinstance(result, tuple) else y

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the block's own class, because this class cannot be imported."""
        return _empty, (self.original,), self.__dict__


# Class of a block -> class of such blocks with an adapter.
_CLASSES: dict[type[nn.Module], type[Adapted]] = {}


def _with_adapter(kind: type[nn.Module]) -> type[Adapted]:
    """Return the class of blocks of class `kind` with an adapter; make it the first time.

    Raises:
        UserError: `kind` has an adapter already.
    """
    if issubclass(kind, Adapted):
        raise UserError("The backbone has adapters already.")
    if kind not in _CLASSES:
        made: Any = type(f"Adapted{kind.__name__}", (Adapted, kind), {"original": kind})
        made.forward = Adapted.forward  # transformers wraps the forward of subclasses of its layers
        _CLASSES[kind] = made
    return _CLASSES[kind]


def _empty(kind: type[nn.Module]) -> Adapted:
    made = _with_adapter(kind)
    block: Adapted = made.__new__(made)
    return block


@branches.register
def _adapted(block: Adapted) -> list[Branch]:
    *others, last = branches.dispatch(block.original)(block)
    # A copy: the backbone's next window may be longer, while this branch still has to be
    # recomputed.
    timeline = block.adapter.timeline
    timeline = None if timeline is None else timeline.copy()
    return [*others, _joined(last, block.adapter, timeline)]


def _joined(last: Branch, adapter: TemporalAdapter, timeline: Timeline | None) -> Branch:
    """Join a block's last branch and the adapter; stochastic depth applies to the former only."""

    def function(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = last(x, *args, **kwargs)
        if last.drop_path is not None:
            y = y * last.drop_path(x.new_ones(x.shape[0], *(1,) * (x.ndim - 1)))
        grid = _Grid.of(x.shape, timeline)
        return y + grid.tokens(adapter(grid.columns(x + y)), x.shape)

    def cut(x: Tensor, *args: Any, **kwargs: Any) -> Layout:
        assert isinstance(last.cut, ByToken)
        return _Columns(
            last=last,
            adapter=adapter,
            args=args,
            kwargs=kwargs,
            grid=_Grid.of(x.shape, timeline),
            ones=x.new_ones(x.shape[0], 1),
            width=last.cut.width,
        )

    return Branch(
        last.name,
        (*last.modules, adapter),
        function,
        cut=cut if isinstance(last.cut, ByToken) else None,  # others mix places
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Columns:
    """Layout by columns: a place, or a class token, with all time steps of a window."""

    last: Branch
    adapter: TemporalAdapter
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    grid: _Grid
    ones: Tensor
    width: int
    contiguous: ClassVar[bool] = False
    light: ClassVar[bool] = True

    @property
    def units(self) -> int:
        """Number of columns of all windows."""
        return self.grid.windows * self.grid.columns_a_window

    @property
    def elements(self) -> int:
        """Elements per column: the MLP's, and the adapter's (the sum, 3 of C and 6 of C / 4)."""
        return self.grid.steps * (self.width + 6 * self.adapter.channels)

    def share(self) -> tuple[Tensor, ...]:
        """Draw the factors of stochastic depth, one per sample, shared by all pieces."""
        if self.last.drop_path is None:
            return ()
        factors = self.last.drop_path(self.ones)
        return () if factors is self.ones else (factors,)

    def new(self, piece: Tensor, shape: torch.Size) -> Tensor:
        """Make an empty tensor of a shape, with a spare row after its end for padding."""
        return piece.new_empty(prod(shape[:-1]) + 1, shape[-1])[:-1].view(shape)

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Gather columns `(n, T, C)`, zero at padding."""
        return self._places(start, stop, x).take(x)

    def put(self, out: Tensor, start: int, stop: int, piece: Tensor) -> None:
        """Write columns to their rows."""
        channels = out.shape[-1]
        # with the spare row of `new`, to which padding is written
        tokens = out.as_strided((out.numel() // channels + 1, channels), (channels, 1))
        tokens[self.grid.rows(start, stop, out.device)] = piece

    def add(
        self,
        out: Tensor,
        start: int,
        stop: int,
        piece: Tensor,
        grid: Points | None = None,
        sign: int = 1,
    ) -> None:
        """Add columns to their rows."""
        self._places(start, stop, out).add(out, piece, grid, sign)

    def _places(self, start: int, stop: int, x: Tensor) -> Places:
        rows = self.grid.rows(start, stop, x.device)
        if self.grid.timeline.first == 0:
            return Places(rows)
        return Places.behind(rows, x.numel() // x.shape[-1])

    def run(
        self,
        branch: Any,  # noqa: ARG002
        piece: Tensor,
        start: int,
        stop: int,
        shared: Sequence[Tensor],
    ) -> Tensor:
        """Run the block's last branch on all columns, and the adapter on those of places."""
        y = self.last(piece, *self.args, **self.kwargs)
        # the factors that `share` drew, so that all pieces of a sample drop the same branch
        for factors in shared:
            y = y * self._spread(factors, start, stop)
        term = self.adapter(piece + y)
        if self.grid.timeline.first:
            unit = torch.arange(start, stop, device=piece.device) % self.grid.columns_a_window
            term = term.masked_fill((unit >= self.grid.places)[:, None, None], 0)
        result: Tensor = y + term
        return result

    def _spread(self, factors: Tensor, start: int, stop: int) -> Tensor:
        """Expand the factors of samples to `(n, T, 1)`."""
        line = self.grid.timeline
        by_time = factors.view(-1, line.clips, 1).expand(-1, -1, line.steps).flatten(1)
        unit = torch.arange(start, stop, device=factors.device)
        return by_time[unit // self.grid.columns_a_window].unsqueeze(-1)


@returned.register
def _returned(block: Adapted, y: Tensor, *args: Any, **kwargs: Any) -> Any:
    return returned.dispatch(block.original)(block, y, *args, **kwargs)


def additions(backbone: nn.Module) -> Iterator[nn.Module]:
    """Yield the trainable modules that were added to a backbone: adapters, LoRA's."""
    for module in backbone.modules():
        if isinstance(module, TemporalAdapter):
            yield module
        elif hasattr(module, "base_layer"):  # peft's layers, found without importing peft
            yield from (part for name, part in module.named_children() if name.startswith("lora_"))


class Addition(Protocol):
    """Configuration of trainable modules that are added to a frozen backbone."""

    def add_to(self, backbone: nn.Module) -> list[nn.Module]:
        """Add the modules in place, and return the modules that a forward has to call."""
        ...


def refuse_unused(addition: Addition, config: BackboneConfig, size: int) -> None:
    """Run a backbone without its weights, to check that it calls all added modules.

    Blocks that read the weights of a layer instead of calling it would ignore LoRA.

    Args:
        addition: configuration of the added modules.
        config: shape of the backbone.
        size: side of the frames in pixels.

    Raises:
        UserError: the backbone does not call all of them, or does not support them.
    """
    called: set[nn.Module] = set()
    backbone: Any = without_weights(config.build)
    device = next(backbone.parameters()).device
    with torch.device(device), torch.no_grad(), torch.random.fork_rng(devices=[]):
        added = addition.add_to(backbone)
        for module in added:
            module.register_forward_hook(lambda module, *_: called.add(module))
        backbone(torch.zeros(1, 3, backbone.multiple, size, size))
    unused = {*added} - called
    names = [name for name, module in backbone.named_modules() if module in unused]
    if names:
        raise UserError(
            f"The blocks of this backbone read the weights of {', '.join(shortened(names, 1))} "
            "but do not call these layers: LoRA would have no effect there. Leave them out "
            "(--model.lora.layers mlp or attention), or use --model.tuning adapters."
        )
