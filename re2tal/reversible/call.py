"""One call of a branch: cut to its budget of memory, scaled by stochastic depth, checked."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from re2tal.reversible.branches import Branch
from re2tal.reversible.cuts import Layout, Whole, per_unit, spans
from re2tal.reversible.replay import ReversibleError, counts_statistics
from re2tal.reversible.settings import Settings, bytes_of_piece
from re2tal.reversible.streams import stream_dtype

Span = tuple[int, int]


def shaped(x: Tensor, shape: torch.Size) -> Tensor:
    """In this shape; as it is if it has it, for `reshape` would lose the memory format."""
    return x if x.shape == shape else x.reshape(shape)


class Joined:
    """A result of the input's shape, put together from its pieces.

    Args:
        layout: of the pieces.
        shape: of the result.
    """

    def __init__(self, layout: Layout, shape: torch.Size) -> None:
        self._layout = layout
        self._shape = shape
        self.fresh = False  # whether nothing else can hold the result's memory
        self.tensor: Tensor | None = None

    def put(self, span: Span, piece: Tensor) -> None:
        """Add the result for some units."""
        if self._layout.contiguous and span == (0, self._layout.units):
            self.tensor = shaped(piece, self._shape)
            return
        if self.tensor is None:
            self.fresh = True
            self.tensor = self._layout.new(piece, self._shape)
        self._layout.put(self.tensor, *span, piece)

    def result(self) -> Tensor:
        """The whole, when every piece is there."""
        assert self.tensor is not None
        return self.tensor


class BranchCall:
    """A branch, the place where it stands, and what its block was called with.

    Args:
        branch: the branch.
        where: its place in the model, for errors.
        dtype: of the stage's input, which the block was made for.
        settings: how its stage runs.
        args: what the block was called with after its first argument.
        kwargs: what it was called with by name.
    """

    def __init__(
        self,
        branch: Branch,
        where: str,
        dtype: torch.dtype,
        settings: Settings,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.branch = branch
        self.where = where
        self._dtype = dtype
        self._settings = settings
        self._args = tuple(args)
        self._kwargs = dict(kwargs or {})

    def refuse_other_gradients(self) -> None:
        """Make sure that no tensor beside the streams and the parameters needs a gradient.

        Raises:
            ReversibleError: if one of the block's arguments does.
        """
        given = tree_leaves((self._args, self._kwargs))
        if any(isinstance(a, Tensor) and a.requires_grad for a in given):
            raise ReversibleError(
                f"{self.where}: the block is called with a second tensor that needs a gradient, "
                "which a reversible stage would not give it. Detach it, or call "
                "set_reversible(model, False)."
            )

    def layout(self, stream: Tensor) -> tuple[Layout, list[Span]]:
        """The units of an input ``(B, ...)`` and the spans of them that run at once."""
        cut, tied = self.branch.cut, any(map(counts_statistics, self._submodules()))
        if self._settings.slice_bytes is None or cut is None or tied or stream.numel() == 0:
            return Whole(self._args, self._kwargs), [(0, 1)]
        layout = cut(stream, *self._args, **self._kwargs)
        return layout, spans(layout, bytes_of_piece(self._settings.slice_bytes, stream))

    def share(self, layout: Layout, stream: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What all pieces use: the layout's shared tensors, and stochastic depth's factors."""
        factor = None
        if self.branch.drop_path is not None:
            ones = stream.new_ones(stream.shape[0], 1)
            scaled = self.branch.drop_path(ones)
            factor = None if scaled is ones else scaled
        return layout.share(), factor

    def piece(
        self,
        layout: Layout,
        span: Span,
        piece: Tensor,
        shared: Sequence[Tensor],
        factor: Tensor | None,
    ) -> Tensor:
        """The increment for a piece of the stream, ``a(F(x) + alpha x)``, not yet on the grid.

        Raises:
            ReversibleError: if the branch changes the shape, or its input.
        """
        version = None if piece.is_inference() else piece._version
        try:
            result = layout.run(self.branch, piece.to(self._dtype), *span, shared)
        except RuntimeError as error:
            if "in-place operation" in str(error):
                raise self._in_place() from error
            raise
        if version is not None and piece._version != version:
            raise self._in_place()
        if result.shape != piece.shape:
            raise ReversibleError(
                f"{self.where} turns the shape {tuple(piece.shape)} into {tuple(result.shape)}, "
                "but a residual branch keeps it. Let the family raise ChangesShapeError for such "
                "blocks."
            )
        result = result.to(stream_dtype(self._dtype))
        if factor is not None:
            result = result * per_unit(factor, layout, *span, result.ndim)
        return self._settings.coupling.increment(result, piece, self.branch.activation)

    def _submodules(self) -> list[torch.nn.Module]:
        return [m for top in self.branch.modules for m in top.modules()]

    def _in_place(self) -> ReversibleError:
        return ReversibleError(
            f"{self.where} modifies its input in place, and with it the skip connection. Use the "
            "out-of-place form of its first operation, for example ReLU(inplace=False)."
        )


class _Take(torch.autograd.Function):
    """All pieces of a tensor; the backward joins their gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(layout: Layout, cuts: Sequence[Span], x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layout.take(x, *span).clone() for span in cuts)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.layout, ctx.cuts, x = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        joined = Joined(ctx.layout, ctx.shape)
        for span, gradient in zip(ctx.cuts, gradients, strict=True):
            joined.put(span, gradient)
        return None, None, joined.result()


class _Join(torch.autograd.Function):
    """A result from its pieces; the backward takes the gradient apart."""

    generate_vmap_rule = True

    @staticmethod
    def forward(layout: Layout, cuts: Sequence[Span], shape: torch.Size, *pieces: Tensor) -> Tensor:
        joined = Joined(layout, shape)
        for span, piece in zip(cuts, pieces, strict=True):
            joined.put(span, piece)
        return joined.result()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.layout, ctx.cuts = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        taken = (ctx.layout.take(gradients[0], *span) for span in ctx.cuts)
        return None, None, None, *taken


def run_stored(call: BranchCall, stream: Tensor) -> Tensor:
    """A branch's increment as autograd has it, storing activations where gradients are on."""
    layout, cuts = call.layout(stream)
    shared, factor = call.share(layout, stream)
    if len(cuts) == 1 and layout.contiguous:
        piece = layout.take(stream, *cuts[0])
        return shaped(call.piece(layout, cuts[0], piece, shared, factor), stream.shape)
    if not torch.is_grad_enabled():
        joined = Joined(layout, stream.shape)
        for span in cuts:
            joined.put(span, call.piece(layout, span, layout.take(stream, *span), shared, factor))
        return joined.result()
    taken = _Take.apply(layout, cuts, stream)
    pieces = [
        call.piece(layout, span, piece, shared, factor)
        for span, piece in zip(cuts, taken, strict=True)
    ]
    result: Tensor = _Join.apply(layout, cuts, stream.shape, *pieces)
    return result
