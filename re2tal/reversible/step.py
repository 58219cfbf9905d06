"""Step: one branch in one forward of its stage, from ``x_{i-1}`` and ``x_{i-2}`` to ``x_i``.

With the increment ``u_i = a_i(F_i(x_{i-1}) + alpha x_{i-1})``,

    forward    x_i = u_i + beta x_{i-2}
    replay     x_{i-2} = (x_i - u_i) / beta,    g_{i-1} += (du_i / dx_{i-1})^T g_i

A `Step` leaves the gradients to autograd, which stores activations. A `ReversibleStep` stores none:
its replay in the backward pass computes the increment again with gradients, subtracts it, and
differentiates it. Both run the branch piece by piece, and change streams and gradients in place, so
that one piece is all that is alive beside these. With a grid, ``u_i`` is rounded before it is added
or subtracted.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from re2tal.reversible.branches import Branch
from re2tal.reversible.coupling import Coupling, Grid, Settings, bytes_of_piece, stream_dtype
from re2tal.reversible.layouts import Layout, Whole
from re2tal.reversible.pieces import (
    Join,
    Joined,
    Span,
    Take,
    Totals,
    decisive,
    differentiate,
    hooks_paused,
    per_unit,
    shaped,
    spans,
)
from re2tal.reversible.replay import (
    Autocast,
    Conditions,
    Draws,
    ReversibleError,
    Surroundings,
    counts_statistics,
)


class Step:
    """Branch in one forward of its stage, with the arguments of its block's call.

    Args:
        branch: the branch.
        where: name in the model, for errors.
        dtype: dtype of the stage's input. The branch gets its input in this dtype, while the
            streams are at least float32.
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
        """Check that no argument of the block's call needs a gradient, which it would not get.

        Raises:
            ReversibleError: if one does.
        """
        given = tree_leaves((self._args, self._kwargs))
        if any(isinstance(a, Tensor) and a.requires_grad for a in given):
            raise ReversibleError(
                f"{self.where}: the block is called with a second tensor that needs a gradient, "
                "which a reversible stage would not give it. Detach it, or call "
                "set_reversible(model, False)."
            )

    def increment(self, stream: Tensor) -> Tensor:
        """Compute the increment ``u_i``, not yet rounded; autograd stores what it needs."""
        layout, cuts = self.layout(stream)
        shared, factor = self.share(layout, stream)
        if len(cuts) == 1 and layout.contiguous:
            piece = layout.take(stream, *cuts[0])
            return shaped(self.piece(layout, cuts[0], piece, shared, factor), stream.shape)
        # One autograd node for all pieces: its backward joins their gradients, where slices would
        # sum up one gradient of full size per piece.
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
        """Compute ``x_i`` from ``x_{i-1}`` and ``x_{i-2}`` without gradients.

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
            del piece  # before the next one is made
        return following.result()

    def following(
        self, layout: Layout, previous: Tensor, grid: Grid | None, *, overwrite: bool
    ) -> "_Following":
        """Return the accumulator of ``x_i``; for the arguments see `advance`."""
        return _Following(layout, previous, grid, self.coupling.beta, overwrite=overwrite)

    def layout(self, stream: Tensor) -> tuple[Layout, list[Span]]:
        """Lay out an input ``(B, ...)`` in units, and cut these into spans of pieces."""
        modules, cut = self._submodules(), self.branch.cut
        tied = any(map(counts_statistics, modules))  # batch statistics need all samples at once
        if self._settings.slice_bytes is None or cut is None or tied or stream.numel() == 0:
            return Whole(self._args, self._kwargs), [(0, 1)]
        layout = cut(stream, *self._args, **self._kwargs)
        weights = sum(p.nbytes for m in modules for p in m._parameters.values() if p is not None)
        return layout, spans(layout, bytes_of_piece(self._settings.slice_bytes, stream, weights))

    def share(self, layout: Layout, stream: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Compute the tensors that all pieces use.

        Returns:
            The layout's shared tensors, and stochastic depth's factors ``(B, 1)``, None for ones.
        """
        factor = None
        if self.branch.drop_path is not None:
            # Drawn for whole samples, before any piece: a sample may lie in several pieces.
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
        """Compute the increment of a piece, ``a_i(factor F_i(x) + alpha x)``, not yet rounded.

        Raises:
            ReversibleError: if the branch changes the shape, or modifies its input in place.
        """
        # Counts in-place changes of the branch's input; see below.
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


class _Following:
    """Accumulator of ``x_i = u_i + beta x_{i-2}`` from the pieces of the increment ``u_i``.

    The result has the memory format of the increment. If ``x_{i-2}`` has that format and beta is 1,
    the pieces are added to its memory, or to a copy of it. Otherwise they are joined in new memory:
    with another beta, scaling ``x_{i-2}`` first would round once more than `Coupling.advance`.
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
        """Add a piece of the increment, not yet rounded to the grid."""
        if not self._begun:
            self._begin(span, increment)
        if self._joined is None:
            self._layout.add(self._previous, *span, increment, self._grid)
        else:
            taken = self._layout.take(self._previous, *span)
            increment = increment if self._grid is None else self._grid.round(increment)
            self._joined.put(span, torch.add(increment, taken, alpha=self._beta))

    def result(self) -> Tensor:
        """Return ``x_i``, once all pieces are added."""
        # Detached, because a view keeps its base alive, which `alone` would count as a holder.
        return self._previous if self._joined is None else self._joined.result().detach()

    def _begin(self, span: Span, increment: Tensor) -> None:
        self._begun = True
        shape = self._previous.shape
        if self._layout.contiguous and span == (0, self._layout.units):
            like = shaped(increment, shape)
        else:  # the strides that `Joined` would give the result, without allocating it
            like = self._layout.new(increment, torch.Size((0, *shape[1:])))
        wanted, had = like.stride(), self._previous.stride()
        # The stride of a dimension of length 1 means nothing.
        same = all(a == b for a, b, n in zip(wanted, had, shape, strict=True) if n > 1)
        if not same or self._beta != 1:
            self._joined = Joined(self._layout, shape)
        elif not self._overwrite:
            self._previous = self._previous.clone()


class ReversibleStep:
    """Step that stores no activations and is replayed for its gradients.

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
        # Held for the replay, whose own layout finds the tensors of this one, such as indices,
        # in a cache of weak references.
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
        """Tell whether a parameter needs a gradient."""
        return any(p.requires_grad for p in self.parameters)

    def forward(self, current: Tensor, previous: Tensor, *, overwrite: bool = False) -> Tensor:
        """Compute ``x_i`` from ``x_{i-1}`` and ``x_{i-2}``; see `Step.advance`."""
        # PyTorch may choose kernels by whether an input needs a gradient, and the replay must run
        # the same ones. So autograd records here too, and its record is dropped piece by piece.
        with self._conditions.noted(), torch.enable_grad():
            self._mark(current)  # part 0 draws for all pieces; part 1 + i is piece i
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
                del result, leaf  # frees what autograd has stored for the piece
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
        """Recompute the increment piece by piece, subtract it from ``x_i``, and differentiate it.

        Args:
            current: ``x_{i-1}``; it is not changed.
            following: ``x_i``, which becomes ``x_{i-2}`` in place; None if that is not needed.
            gradient: ``g_i``; None computes no gradients.
            passed: ``g_{i-1}`` so far, to which ``(du_i / dx_{i-1})^T g_i`` is added in place; None
                if it is not needed.
            wanted: parameters whose gradients are wanted.

        Returns:
            The gradients of the wanted parameters; None where a parameter is not used.

        Raises:
            ReversibleError: if the branch is no longer that of the forward.
        """
        surroundings = Surroundings(current.device)
        with self._conditions.met_again(), torch.enable_grad(), hooks_paused(wanted):
            with self._draws.replayed(0):
                layout, _ = self._step.layout(current)
                shared, factor = self._step.share(layout, current)
            leaves = [s.detach().requires_grad_(s.requires_grad) for s in shared]
            needing = [s for s in leaves if s.requires_grad]
            totals = Totals(len(wanted) + len(needing))
            # Last piece first, as autograd sums the gradients of a parameter's uses: the order of
            # floating-point sums decides their last bit.
            for part in reversed(range(len(self._cuts))):
                span = self._cuts[part]
                with self._draws.replayed(1 + part):
                    leaf = self._leaf(layout, span, current)
                    result = self._step.piece(layout, span, leaf, leaves, factor)
                if following is not None:
                    layout.add(following, *span, result.detach(), self._grid, -1)
                if gradient is None or not result.requires_grad:
                    continue
                # The edge instead of the tensor, whose values are not needed any more.
                edge = get_gradient_edge(result)
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
        """Check that no tensor but the input and the parameters would get a gradient."""
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
    """Make the steps of one forward reversible, and note which of their inputs need a gradient."""
    autocast, needs, made = Autocast(stream.device), stream.requires_grad, []
    for step in steps:
        one = ReversibleStep(step, grid, autocast, stream.device, needs_gradient=needs)
        needs = needs or one.trains
        made.append(one)
    return made


def _leaves(result: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors of a result's autograd graph that need a gradient."""
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


def _through_shared(
    shared: Sequence[Tensor], totals: Totals, wanted: Sequence[Tensor]
) -> list[Tensor | None]:
    """Add the part of the parameters' gradients that flows through the pieces' shared tensors.

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
