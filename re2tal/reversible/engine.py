"""The engine: one autograd node a branch, and a tape that is rewound from node to node.

The forward of a stage stores nothing per branch. At its end the tape holds the last two streams.
The backward of branch ``i`` finds ``x_i`` and ``x_{i-1}`` on the tape, repeats ``F_i(x_{i-1})``
with gradients, rewinds the tape to ``x_{i-1}`` and ``x_{i-2}``, and returns the gradients of both
streams and of its parameters to autograd. So parameter gradients leave branch by branch, hooks and
DDP see them as they see those of any other node, and the activations of a branch live only while it
is differentiated. The equations are in `streams`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from re2tal.reversible.coupling import Coupling, Grid, Settings, stream_dtype
from re2tal.reversible.replay import ReversibleError, uncached
from re2tal.reversible.step import BranchCall, Step, run_stored, steps_of
from re2tal.reversible.tape import Tape, no_gradients_of_gradients, rebuildable
from re2tal.reversible.watch import Watch, Witness


class _Place:
    """Where a step stands in its stage: what its autograd node keeps."""

    def __init__(self, step: Step, settings: Settings, tape: Tape, depth: int) -> None:
        self.step = step
        self.settings = settings
        self.tape = tape
        self.depth = depth
        self.witness: Witness | None = None  # of the streams below the bottom of the tape

    def rewind(self, increment: Tensor, owned: bool) -> None:
        """Take the tape one branch back, or let it go at its bottom."""
        following, current = self.tape.at(self.depth, self.step.where)
        at_bottom = self.depth == self.tape.bottom
        if at_bottom and self.witness is None:
            self.tape.release()
            return
        previous = self.settings.coupling.rewind(increment, following, overwrite=owned)
        if at_bottom:
            assert self.witness is not None
            self.witness.compare(current, previous)
            self.tape.release()
        else:
            self.tape.hold(self.depth - 1, current, previous)


class _BranchNode(torch.autograd.Function):
    """``x_i`` from ``x_{i-1}``, ``x_{i-2}`` and the parameters of branch ``i``."""

    @staticmethod
    def forward(
        ctx: Any, place: _Place, current: Tensor, previous: Tensor, *_parameters: Tensor
    ) -> Tensor:
        ctx.place = place
        return place.settings.coupling.advance(place.step.first(current), previous)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        place: _Place = ctx.place
        step = place.step
        no_gradients_of_gradients(step.where)
        _, needs_current, _, *needs_parameters = ctx.needs_input_grad
        wanted = [p for p, needed in zip(step.parameters, needs_parameters, strict=True) if needed]
        _, current = place.tape.at(place.depth, step.where)
        found = step.again(current, gradient, wanted, to_input=needs_current)
        place.rewind(found.increment, found.owned)
        remaining = iter(found.to_parameters)
        return (
            None,
            found.to_input,
            place.settings.coupling.skip_gradient(gradient),
            *(next(remaining) if needed else None for needed in needs_parameters),
        )


def run_stage(
    calls: Sequence[BranchCall], x: Tensor, settings: Settings, watch: Watch, where: str
) -> Tensor:
    """Run the branches of one stage.

    Args:
        calls: the branches in order.
        x: the stage's input, ``(B, ...)`` of a floating dtype.
        settings: how to run.
        watch: of the stage's container; it decides whether a coupling may be rebuilt.
        where: the stage's place in the model, for errors.

    Returns:
        The merged streams, of the shape and dtype of ``x``.

    Raises:
        ReversibleError: under `torch.func` transforms, which cannot be replayed, for an argument
            that needs a gradient of its own, or for what a check of an earlier backward found.
    """
    watch.poll()
    stream = x.to(stream_dtype(x.dtype))
    if stream.numel() == 0:  # nothing to rebuild, and no largest value
        return _stored(calls, stream, settings.coupling, None).to(x.dtype)
    grid = None if settings.grid is None else Grid.of(settings.grid, stream)
    if grid is not None:
        # Adding zero makes -0.0 into 0.0, which is what the way back would yield.
        stream = grid.round(stream).add_(0.0)
    if not torch.is_grad_enabled() or watch.stores(calls, stream, settings, where):
        return _stored(calls, stream, settings.coupling, grid).to(x.dtype)
    if torch._C._are_functorch_transforms_active():
        raise ReversibleError(
            "A reversible stage cannot run under torch.func transforms (grad, vmap, jvp, ...). "
            "Call set_reversible(model, False)."
        )
    for call in calls:
        call.refuse_other_gradients()
    return _reversible(calls, stream, settings, grid, watch, where, x.dtype)


def _both_streams(stream: Tensor) -> tuple[Tensor, Tensor]:
    """``x_0`` and ``x_{-1}``, whose gradients are summed apart and only then to the stage's input.

    The order of summation is thus the same whether activations are stored or rebuilt.
    """
    return _alias(stream), _alias(stream)


def _alias(x: Tensor) -> Tensor:
    # view_as() would give a batch of one another stride, and lose the memory format with it.
    alias: Tensor = torch.ops.aten.alias(x)
    return alias


def _stored(
    calls: Sequence[BranchCall], stream: Tensor, coupling: Coupling, grid: Grid | None
) -> Tensor:
    current, previous = _both_streams(stream)
    for call in calls:
        # An alias sums the gradients of all uses inside the branch before the others are added: as
        # in the reversible run, and the order of summation decides about the last bit.
        with uncached():
            increment = run_stored(call, _alias(current))
        if grid is not None:
            increment = grid.round(increment)
        current, previous = coupling.advance(increment, previous), current
    return coupling.merge(current, previous)


def _reversible(
    calls: Sequence[BranchCall],
    stream: Tensor,
    settings: Settings,
    grid: Grid | None,
    watch: Watch,
    where: str,
    dtype: torch.dtype,
) -> Tensor:
    tape, coupling = Tape(), settings.coupling
    current, previous = _both_streams(stream)
    extent = watch.extent(grid, stream, where)
    witness = None
    for depth, step in enumerate(steps_of(calls, stream, grid), start=1):
        place = _Place(step, settings, tape, depth)
        following = _BranchNode.apply(place, current, previous, *step.parameters)
        if following.requires_grad and not tape.bottom:
            tape.bottom = depth
            place.witness = witness = watch.witness(current, previous, settings, where)
        extent.see(following)
        current, previous = following, current
    largest = extent.judge()
    if witness is not None:
        witness.largest = largest
    result = coupling.merge(current, previous).to(dtype)
    if tape.bottom:
        tape.hold(len(calls), current, previous)

        def merged() -> Tensor:
            return coupling.merge(*tape.at(len(calls), f"What follows {where}")).to(dtype)

        rebuildable(result, merged)
    return result
