"""A step: ``x_i`` from ``x_{i-1}``, one branch in one forward of its stage.

A `Step` computes the increment as autograd does, storing activations. A `ReversibleStep` stores
none: its forward adds the increment to ``x_{i-2}``, and its replay in the backward pass computes
the increment again, now with gradients, and takes it back. Both run the branch piece by piece and
change streams and gradients in place, so that one piece is all that is alive beside these.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from re2tal.reversible.branches import Branch, Layout, Whole, per_unit, spans
from re2tal.reversible.coupling import Coupling, Grid, Settings, bytes_of_piece, stream_dtype
from re2tal.reversible.replay import (
    Autocast,
    Conditions,
    Draws,
    ReversibleError,
    Surroundings,
    counts_statistics,
)

Span = tuple[int, int]
"""First unit of a piece, and the one behind its last."""


class Step:
    """A branch in one forward of its stage, with the arguments of its block's call.

    Args:
        branch: the branch.
        where: name in the model, for errors.
        dtype: dtype of the stage's input, which the block was made for.
        settings: settings of the stage.
        args: positional arguments of the block's call after the first.
        kwargs: keyword arguments of the block's call.
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

    @property
    def coupling(self) -> Coupling:
        """Coupling of the stage."""
        return self._settings.coupling

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

    def increment(self, stream: Tensor) -> Tensor:
        """Compute the increment, storing activations where gradients are on."""
        layout, cuts = self.layout(stream)
        shared, factor = self.share(layout, stream)
        if len(cuts) == 1 and layout.contiguous:
            piece = layout.take(stream, *cuts[0])
            return _shaped(self.piece(layout, cuts[0], piece, shared, factor), stream.shape)
        taken = Take.apply(layout, cuts, stream)
        pieces = [
            self.piece(layout, span, piece, shared, factor)
            for span, piece in zip(cuts, taken, strict=True)
        ]
        result: Tensor = Join.apply(layout, cuts, stream.shape, *pieces)
        return result

    def advance(
        self, current: Tensor, previous: Tensor, grid: Grid | None, *, overwrite: bool
    ) -> Tensor:
        """Compute ``x_i`` from ``x_{i-1}`` and ``x_{i-2}``, storing nothing.

        Args:
            current: ``x_{i-1}``.
            previous: ``x_{i-2}``.
            grid: grid of the streams.
            overwrite: whether ``x_i`` may take the memory of ``x_{i-2}``.
        """
        layout, cuts = self.layout(current)
        shared, factor = self.share(layout, current)
        following = self.following(layout, previous, grid, overwrite=overwrite)
        for span in cuts:
            piece = self.piece(layout, span, layout.take(current, *span), shared, factor)
            following.put(span, piece)
            del piece
        return following.result()

    def following(
        self, layout: Layout, previous: Tensor, grid: Grid | None, *, overwrite: bool
    ) -> "_Following":
        """Begin ``x_i`` on top of ``x_{i-2}``; see `advance`."""
        return _Following(layout, previous, grid, self.coupling.beta, overwrite=overwrite)

    def layout(self, stream: Tensor) -> tuple[Layout, list[Span]]:
        """Lay out an input ``(B, ...)`` in units, and cut these into the spans of pieces."""
        modules, cut = self._submodules(), self.branch.cut
        tied = any(map(counts_statistics, modules))
        if self._settings.slice_bytes is None or cut is None or tied or stream.numel() == 0:
            return Whole(self._args, self._kwargs), [(0, 1)]
        layout = cut(stream, *self._args, **self._kwargs)
        weights = sum(p.nbytes for m in modules for p in m._parameters.values() if p is not None)
        return layout, spans(layout, bytes_of_piece(self._settings.slice_bytes, stream, weights))

    def share(self, layout: Layout, stream: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Compute the tensors that all pieces use: the layout's, and stochastic depth's factors."""
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
        """Compute the increment of a piece, ``a(F(x) + alpha x)``, not yet on the grid.

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


class Joined:
    """Tensor of the input's shape that is put together from pieces.

    Attributes:
        tensor: the tensor so far; None before the first piece.
    """

    def __init__(self, layout: Layout, shape: torch.Size) -> None:
        self._layout = layout
        self._shape = shape
        self.tensor: Tensor | None = None

    def put(self, span: Span, piece: Tensor) -> None:
        """Write a piece to its place."""
        if self._layout.contiguous and span == (0, self._layout.units):
            self.tensor = _shaped(piece, self._shape)
            return
        if self.tensor is None:
            self.tensor = self._layout.new(piece, self._shape)
        self._layout.put(self.tensor, *span, piece)

    def result(self) -> Tensor:
        """Return the whole, once every piece is there."""
        assert self.tensor is not None
        return self.tensor


class _Following:
    """``x_i``, which is put together from ``x_{i-2}`` and the pieces of its increment.

    It has the memory format of the increment. Where ``x_{i-2}`` has the same one and beta is 1, the
    increment is added to it, or to a copy; otherwise a product and a sum, each rounded, would not
    be those of `advance`.
    """

    def __init__(
        self,
        layout: Layout,
        previous: Tensor,
        grid: Grid | None,
        beta: float,
        *,
        overwrite: bool,
    ) -> None:
        self._layout = layout
        self._previous = previous
        self._grid = grid
        self._beta = beta
        self._overwrite = overwrite
        self._joined: Joined | None = None
        self._begun = False

    def put(self, span: Span, increment: Tensor) -> None:
        """Take in a piece of the increment, not yet on the grid."""
        if not self._begun:
            self._begin(span, increment)
        if self._joined is None:
            self._layout.add(self._previous, *span, increment, self._grid)
        else:
            taken = self._layout.take(self._previous, *span)
            increment = increment if self._grid is None else self._grid.round(increment)
            self._joined.put(span, torch.add(increment, taken, alpha=self._beta))

    def result(self) -> Tensor:
        """Return the whole, once every piece is there."""
        # Detached: a view would hold the tensor that it is a view of, and with it the memory.
        return self._previous if self._joined is None else self._joined.result().detach()

    def _begin(self, span: Span, increment: Tensor) -> None:
        self._begun = True
        shape = self._previous.shape
        if self._layout.contiguous and span == (0, self._layout.units):
            like = _shaped(increment, shape)
        else:  # what `Joined` will make, without its memory
            like = self._layout.new(increment, torch.Size((0, *shape[1:])))
        wanted, had = like.stride(), self._previous.stride()
        same = all(a == b for a, b, n in zip(wanted, had, shape, strict=True) if n > 1)
        if not same or self._beta != 1:
            self._joined = Joined(self._layout, shape)
        elif not self._overwrite:
            self._previous = self._previous.clone()


def _shaped(x: Tensor, shape: torch.Size) -> Tensor:
    # reshape() to the shape that a tensor has already would lose its memory format.
    return x if x.shape == shape else x.reshape(shape)


class Take(torch.autograd.Function):
    """All pieces of a tensor; the backward joins their gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(layout: Layout, cuts: Sequence[Span], x: Tensor) -> tuple[Tensor, ...]:
        """Take a tensor apart."""
        return tuple(layout.take(x, *span).clone() for span in cuts)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        """Keep the layout."""
        ctx.layout, ctx.cuts, x = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        """Join the gradients of the pieces."""
        joined = Joined(ctx.layout, ctx.shape)
        for span, gradient in zip(ctx.cuts, gradients, strict=True):
            joined.put(span, gradient)
        return None, None, joined.result()


class Join(torch.autograd.Function):
    """Tensor from its pieces; the backward takes the gradient apart."""

    generate_vmap_rule = True

    @staticmethod
    def forward(layout: Layout, cuts: Sequence[Span], shape: torch.Size, *pieces: Tensor) -> Tensor:
        """Put a tensor together."""
        joined = Joined(layout, shape)
        for span, piece in zip(cuts, pieces, strict=True):
            joined.put(span, piece)
        return joined.result()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        """Keep the layout."""
        ctx.layout, ctx.cuts = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Take the gradient apart."""
        taken = (ctx.layout.take(gradients[0], *span) for span in ctx.cuts)
        return None, None, None, *taken


class ReversibleStep:
    """A step that stores no activations, and is replayed for its gradients.

    Args:
        step: the step.
        grid: grid of the stage's streams; None is plain floating point.
        autocast: autocast state of the forward.
        device: device of the streams.
        needs_gradient: whether the step's input needs a gradient.
    """

    def __init__(
        self,
        step: Step,
        grid: Grid | None,
        autocast: Autocast,
        device: torch.device,
        *,
        needs_gradient: bool,
    ) -> None:
        self.where = step.where
        self._step = step
        self._grid = grid
        self._needs_gradient = needs_gradient
        self._conditions = Conditions(step.branch.modules, device, autocast, step.where)
        self._draws = Draws()
        self._cuts: list[Span] = []
        # The replay's layout is another, but takes over what the forward's has, such as indices.
        self._layout: Layout | None = None

    @property
    def name(self) -> str:
        """Name of the branch in its block."""
        return self._step.branch.name

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """Parameters of the branch, each once."""
        return self._conditions.parameters

    @property
    def trains(self) -> bool:
        """Whether a parameter needs a gradient."""
        return any(p.requires_grad for p in self.parameters)

    def forward(self, current: Tensor, previous: Tensor, *, overwrite: bool = False) -> Tensor:
        """Compute ``x_i`` from ``x_{i-1}`` and ``x_{i-2}``; see `Step.advance`."""
        # Kernels may be chosen by whether an input needs a gradient, and the replay must meet the
        # same ones: so gradients are recorded here too, and the record dropped piece by piece.
        with self._conditions.noted(), torch.enable_grad():
            self._mark(current)
            layout, cuts = self._step.layout(current)
            self._layout = layout if layout.light else None
            self._cuts = decisive(cuts) if isinstance(current, FakeTensor) else cuts
            shared, factor = self._step.share(layout, current)
            following = self._step.following(layout, previous, self._grid, overwrite=overwrite)
            for span in self._cuts:
                self._mark(current)
                leaf = self._leaf(layout, span, current)
                result = self._step.piece(layout, span, leaf, shared, factor)
                if span == self._cuts[0]:
                    self._refuse_others(result, leaf)
                increment = result.detach()
                del result, leaf  # and with them what autograd has stored for the piece
                following.put(span, increment)
                del increment
        self._draws.settle()
        return following.result()

    def replay(
        self,
        current: Tensor,
        following: Tensor | None,
        gradient: Tensor | None = None,
        passed: Tensor | None = None,
        wanted: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:
        """Compute the increment again and take it back, and differentiate it, piece by piece.

        Args:
            current: ``x_{i-1}``, as it was.
            following: ``x_i``, which becomes ``x_{i-2}`` in place; None if that is not needed.
            gradient: gradient of ``x_i``; None computes no gradients.
            passed: gradient of ``x_{i-1}`` so far, to which that through the increment is added in
                place; None if it is not needed.
            wanted: parameters whose gradients are wanted.

        Returns:
            The gradients of the wanted parameters; None where a parameter is not used.

        Raises:
            ReversibleError: if the branch is no longer the one of the forward.
        """
        surroundings = Surroundings(current.device)
        with self._conditions.met_again(), torch.enable_grad(), hooks_paused(wanted):
            with self._draws.replayed(0):
                layout, _ = self._step.layout(current)
                shared, factor = self._step.share(layout, current)
            leaves = [s.detach().requires_grad_(s.requires_grad) for s in shared]
            needing = [s for s in leaves if s.requires_grad]
            totals = Totals(len(wanted) + len(needing))
            # Autograd sums over the uses of a parameter from the last to the first, and sums of
            # floating-point numbers depend on their order.
            for part in reversed(range(len(self._cuts))):
                span = self._cuts[part]
                with self._draws.replayed(1 + part):
                    leaf = self._leaf(layout, span, current)
                    result = self._step.piece(layout, span, leaf, leaves, factor)
                if following is not None:
                    layout.add(following, *span, result.detach(), self._grid, -1)
                if gradient is None or not result.requires_grad:
                    continue
                edge = get_gradient_edge(result)  # not the tensor: its values are spent
                del result
                inputs = [*wanted, *needing, *([] if passed is None else [leaf])]
                with surroundings.restored():
                    found = differentiate(edge, inputs, layout.take(gradient, *span))
                if passed is not None and (into := found.pop()) is not None:
                    layout.add(passed, *span, into)
                    del into
                totals.add(found)
                del found
            with surroundings.restored():
                to_parameters = _through_shared(shared, totals, wanted)
        self._layout = None
        if following is not None and (beta := self._step.coupling.beta) != 1:
            following.div_(beta)
        return to_parameters

    def _leaf(self, layout: Layout, span: Span, stream: Tensor) -> Tensor:
        piece = layout.take(stream, *span)
        return piece.detach().requires_grad_(self._needs_gradient)

    def _refuse_others(self, result: Tensor, leaf: Tensor) -> None:
        """Make sure that the gradient goes to the input and the parameters, and nowhere else."""
        known = {id(leaf), *map(id, self.parameters)}
        for tensor in _leaves(result):
            if id(tensor) not in known:
                raise ReversibleError(
                    f"{self.where} uses a tensor of shape {tuple(tensor.shape)} that needs a "
                    "gradient and is neither its input nor a parameter of its modules, so it would "
                    "get none. Name its module in the branch, detach it, or call "
                    "set_reversible(model, False)."
                )

    def _mark(self, stream: Tensor) -> None:
        self._draws.mark(stream, self._conditions.devices)


def reversible_steps(
    steps: Sequence[Step], stream: Tensor, grid: Grid | None
) -> list[ReversibleStep]:
    """Make the steps of one forward reversible, and mark those whose input needs a gradient."""
    autocast, needs, made = Autocast(stream.device), stream.requires_grad, []
    for step in steps:
        one = ReversibleStep(step, grid, autocast, stream.device, needs_gradient=needs)
        needs = needs or one.trains
        made.append(one)
    return made


def _leaves(result: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a result passes gradients to and that no operator computed."""
    found: list[Any] = [result.grad_fn]
    seen: set[Any] = set()
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += (following for following, _ in node.next_functions)
        if hasattr(node, "variable"):
            yield node.variable


def decisive(cuts: list[Span]) -> list[Span]:
    """Choose the pieces that decide how much memory is needed, for tensors without values.

    The last two, with which a backward begins, and the largest of the others: from the third piece
    on, the sums of gradients, the last piece's gradients and the present one's live side by side.
    """
    return sorted(cuts[:-2], key=lambda span: span[0] - span[1])[:1] + cuts[-2:]


def differentiate(
    result: Tensor | GradientEdge, inputs: Sequence[Tensor], gradient: Tensor
) -> list[Tensor | None]:
    """Compute the gradients of the inputs; None where the result does not depend on one."""
    if not inputs:
        return []
    return list(torch.autograd.grad(result, inputs, gradient, allow_unused=True))


def _through_shared(
    shared: Sequence[Tensor], totals: "Totals", wanted: Sequence[Tensor]
) -> list[Tensor | None]:
    """Add to the parameters' gradients what reaches them through the pieces' shared tensors.

    Args:
        shared: the shared tensors.
        totals: gradients of the wanted parameters, and of those shared tensors that need one.
        wanted: the parameters.
    """
    needing = [s for s in shared if s.requires_grad]
    through = zip(needing, totals.values[len(wanted) :], strict=True)
    used = [(s, g) for s, g in through if g is not None]
    if used and wanted:
        tensors, grads = zip(*used, strict=True)
        more = torch.autograd.grad(tensors, wanted, grads, allow_unused=True)
        totals.add([*more, *(None for _ in needing)])
    return totals.values[: len(wanted)]


class Totals:
    """Gradients that are summed up one by one, piece after piece, with one call a piece.

    Attributes:
        values: the sums so far; None stands for zero.
    """

    def __init__(self, count: int) -> None:
        self.values: list[Tensor | None] = [None] * count
        self._own: set[int] = set()

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add to each sum."""
        into: list[int] = []
        anew: list[int] = []
        for i, (total, gradient) in enumerate(zip(self.values, gradients, strict=True)):
            if total is None:
                self.values[i] = gradient
            elif gradient is not None:
                # Autograd may have given the memory of the first to somebody else as well.
                (into if i in self._own else anew).append(i)
        if into:
            torch._foreach_add_(*self._pairs(into, gradients))
        if anew:
            for i, total in zip(
                anew, torch._foreach_add(*self._pairs(anew, gradients)), strict=True
            ):
                self.values[i] = total
            self._own.update(anew)

    def _pairs(self, chosen: list[int], gradients: Sequence[Tensor | None]) -> Any:
        return [self.values[i] for i in chosen], [gradients[i] for i in chosen]


@contextmanager
def hooks_paused(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Keep the parameters' own hooks for the outer backward.

    `torch.autograd.grad` calls them, and autograd will call them again on what a node returns: a
    hook that halves a gradient would quarter it.
    """
    paused = []
    for parameter in parameters:
        hooks = getattr(parameter, "_backward_hooks", None)
        if hooks:
            paused.append((hooks, OrderedDict(hooks)))
            hooks.clear()
    try:
        yield
    finally:
        for hooks, saved in paused:
            hooks.update(saved)
