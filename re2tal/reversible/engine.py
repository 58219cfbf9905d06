"""The engine: one autograd node a step, and a tape that is rewound from node to node.

The forward of a stage stores nothing per step. At its end the tape holds the last two streams. The
backward of step ``i`` finds ``x_i`` and ``x_{i-1}`` on the tape, and ``g_i`` and ``g_{i-1}``, their
gradients as far as they are known. It replays ``F_i(x_{i-1})`` piece by piece, with gradients, and
changes these four in place,

    x_i becomes x_{i-2},   g_{i-1} += J^T g_i,   g_i becomes beta g_i, the first part of g_{i-2},

so that they and a piece are all that is alive. It returns the gradients of its parameters to
autograd: these leave step by step, and hooks and DDP see them as they see those of any other node.

What passes from node to node in autograd's graph is an empty token, which keeps the steps in order.
Streams and their gradients stay on the tape, so that autograd never holds a tensor that is changed
in place. Whoever else holds one, as a hook inside a branch may, is noticed by the count of the
memory's holders and keeps his values: a copy is changed then. The equations are in `coupling`.
"""

import math
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.weak import WeakTensorKeyDictionary

from re2tal.reversible.branches import alone
from re2tal.reversible.coupling import Coupling, Grid, Settings, stream_dtype
from re2tal.reversible.replay import ReversibleError, uncached
from re2tal.reversible.step import ReversibleStep, Step, reversible_steps
from re2tal.reversible.watch import Watch, Witness


def run_stage(
    steps: Sequence[Step], x: Tensor, settings: Settings, watch: Watch, where: str
) -> Tensor:
    """Run the steps of one stage.

    Args:
        steps: the steps in order.
        x: the stage's input, ``(B, ...)`` of a floating dtype.
        settings: settings of the stage.
        watch: watch of the stage's container; it decides whether a coupling may be rebuilt.
        where: name of the stage in the model, for errors.

    Returns:
        The merged streams, of the shape and dtype of ``x``.

    Raises:
        ReversibleError: under `torch.func` transforms, which cannot be replayed, for an argument
            that needs a gradient of its own, or for what a check of an earlier backward found.
    """
    watch.poll()
    stream = x.to(stream_dtype(x.dtype))
    if stream.ndim <= 3:
        # Tokens as a convolution leaves them have their channels far apart, and increments have
        # not: `x_{i-2}` could not become `x_i` in place. More dimensions are a convolution's.
        stream = stream.contiguous()
    if stream.numel() == 0:  # nothing to rebuild, and no largest value
        return _stored(steps, stream, settings.coupling, None).to(x.dtype)
    grid = None if settings.grid is None else Grid.of(settings.grid, stream)
    if grid is not None:
        # Adding zero makes -0.0 into 0.0, which is what the way back would yield.
        stream = grid.round(stream).add_(0.0)
    transformed = torch._C._are_functorch_transforms_active()
    tape = _Tape(settings.coupling, where, steps)
    if not torch.is_grad_enabled() and not transformed and not torch.compiler.is_exporting():
        tape.hold(0, stream, stream)
        del stream  # which `Step.advance` may overwrite, if nobody holds it
        for step in steps:
            with uncached():
                tape.advance(partial(step.advance, grid=grid))
        return tape.merged(x.dtype)
    if not torch.is_grad_enabled() or watch.stores(steps, stream, settings, where):
        return _stored(steps, stream, settings.coupling, grid).to(x.dtype)
    if transformed:
        raise ReversibleError(
            "A reversible stage cannot run under torch.func transforms (grad, vmap, jvp, ...). "
            "Call set_reversible(model, False)."
        )
    for step in steps:
        step.refuse_other_gradients()
    made = reversible_steps(steps, stream, grid)
    extent = watch.extent(grid, stream, where)
    token = _Enter.apply(tape, stream)
    del stream
    give_up(x)
    for depth, one in enumerate(made, start=1):
        if not tape.bottom and (token.requires_grad or one.trains):
            tape.bottom = depth
            tape.witness = watch.witness(*tape.streams, settings, where)
        token = _StepNode.apply(one, tape, depth, token, *one.parameters)
        extent.see(tape.streams[0])
    largest = extent.judge()
    if tape.witness is not None:
        tape.witness.largest = largest
    result: Tensor = _Leave.apply(tape, x.dtype, token)
    return rebuildable(result, partial(tape.merged, x.dtype)) if tape.bottom else result


def leaf_of_trace(module: nn.Module, x: Proxy, *args: Any, **kwargs: Any) -> Any:
    """Enter a call of a module into the graph that torch.fx traces, without looking inside.

    So tools such as torchvision's `create_feature_extractor` work on a rewired model, down to its
    stages: nothing inside a stage exists once it has run.
    """
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *args), kwargs)


def _stored(steps: Sequence[Step], stream: Tensor, coupling: Coupling, grid: Grid | None) -> Tensor:
    # Two aliases, whose gradients are summed apart and only then to the stage's input. An alias in
    # each step, to sum the gradients of all uses inside the branch before the others are added. So
    # does the reversible run, and the order of summation decides about the last bit.
    current, previous = _alias(stream), _alias(stream)
    for step in steps:
        with uncached():
            increment = step.increment(_alias(current))
        if grid is not None:
            increment = grid.round(increment)
        current, previous = coupling.advance(increment, previous), current
    order = _order(current)
    return coupling.merge(_Formatted.apply(order, current), _Formatted.apply(order, previous))


def _alias(x: Tensor) -> Tensor:
    # view_as() would give a batch of one another stride, and lose the memory format with it.
    alias: Tensor = torch.ops.aten.alias(x)
    return alias


class _Formatted(torch.autograd.Function):
    """A stream as it is, and its gradient in the stream's memory format, as on the tape.

    Kernels may be chosen by the format of a gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(order: Sequence[int], x: Tensor) -> Tensor:  # noqa: ARG004
        return _alias(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.order, _ = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, _formatted(gradients[0], ctx.order)


def _order(x: Tensor) -> list[int]:
    """Order the dimensions from the one with the largest stride to that with the smallest."""
    return sorted(range(x.ndim), key=x.stride, reverse=True)


def _formatted(x: Tensor, order: Sequence[int]) -> Tensor:
    """Return a tensor in a memory format, and without a copy if it has it already."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(*order).contiguous().permute(*back)


class _Enter(torch.autograd.Function):
    """Beginning of a stage: its input goes onto the tape, the input's gradient leaves it."""

    @staticmethod
    def forward(ctx: Any, tape: "_Tape", stream: Tensor) -> Tensor:
        ctx.tape = tape
        stream = stream.detach()
        tape.hold(0, stream, stream)
        return stream.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_tokens: Tensor) -> tuple[None, Tensor]:
        to_current, to_previous = ctx.tape.take_gradients()
        return None, _own(to_current).add_(to_previous)


class _StepNode(torch.autograd.Function):
    """``x_i`` from ``x_{i-1}``, ``x_{i-2}`` and the parameters of branch ``i``, on the tape."""

    @staticmethod
    def forward(
        ctx: Any,
        step: ReversibleStep,
        tape: "_Tape",
        depth: int,
        token: Tensor,
        *_parameters: Tensor,
    ) -> Tensor:
        ctx.step, ctx.tape, ctx.depth = step, tape, depth
        tape.advance(step.forward)
        return token.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *tokens: Tensor) -> tuple[Tensor | None, ...]:
        step: ReversibleStep = ctx.step
        tape: _Tape = ctx.tape
        needs_current, *needs_parameters = ctx.needs_input_grad[3:]
        wanted = [p for p, needed in zip(step.parameters, needs_parameters, strict=True) if needed]
        found = iter(tape.rewind(ctx.depth, step, wanted, needs_current=needs_current))
        return (
            *(None, None, None),
            tokens[0] if needs_current else None,
            *(next(found) if needed else None for needed in needs_parameters),
        )


class _Leave(torch.autograd.Function):
    """End of a stage: its merged streams leave the tape, their gradient goes onto it."""

    @staticmethod
    def forward(ctx: Any, tape: "_Tape", dtype: torch.dtype, token: Tensor) -> Tensor:
        ctx.tape, ctx.token = tape, token.detach()
        return tape.merged(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        ctx.tape.begin(gradients[0])
        return None, None, ctx.token


class _Tape:
    """The two streams of one run of a stage where its forward or its backward is.

    Args:
        coupling: coupling of the stage.
        where: name of the stage in the model, for errors.
        steps: steps of the stage.

    Attributes:
        bottom: first step that has a backward; nothing below it needs rebuilding. 0 for none.
        witness: memory of the streams below the bottom; None if they are not compared.
    """

    def __init__(self, coupling: Coupling, where: str, steps: Sequence[Step]) -> None:
        self.bottom = 0
        self.witness: Witness | None = None
        self._coupling = coupling
        self._where = where
        self._end = len(steps)
        self._last = steps[-1].where
        self._depth = 0
        self._streams: tuple[Tensor, Tensor] | None = None
        self._versions: tuple[int, int] = (0, 0)
        self._gradients: tuple[Tensor, Tensor] | None = None

    @property
    def streams(self) -> tuple[Tensor, Tensor]:
        """The newer and the older stream."""
        assert self._streams is not None
        return self._streams

    def hold(self, depth: int, current: Tensor, previous: Tensor) -> None:
        """Hold ``x_depth`` and ``x_{depth-1}``."""
        self._depth = depth
        self._streams = current, previous
        self._versions = version_of(current), version_of(previous)

    def advance(self, compute: Callable[..., Tensor]) -> None:
        """Go one step forward.

        Args:
            compute: `Step.advance`, or the like.
        """
        (current, previous), self._streams = self.streams, None
        overwrite = previous is not current and alone(previous)
        self.hold(self._depth + 1, compute(current, previous, overwrite=overwrite), current)

    def merged(self, dtype: torch.dtype) -> Tensor:
        """Compute the stage's output.

        Raises:
            ReversibleError: if the backward has passed the stage's end.
        """
        return self._coupling.merge(*self._at(self._end, f"What follows {self._where}")).to(dtype)

    def begin(self, gradient: Tensor) -> None:
        """Begin the backward with the gradient of the stage's output.

        Raises:
            ReversibleError: for a second backward, or one that is recorded itself.
        """
        no_gradients_of_gradients(self._last)
        current, _ = self._at(self._end, self._last)
        to_last = torch.empty_like(current).copy_(gradient).mul_(self._coupling.share)
        self._gradients = to_last, to_last  # to be copied when that of the older stream changes

    def rewind(
        self, depth: int, step: ReversibleStep, wanted: Sequence[Tensor], *, needs_current: bool
    ) -> list[Tensor | None]:
        """Go one step back; returns the gradients of its wanted parameters.

        Args:
            depth: number of the step.
            step: the step.
            wanted: parameters whose gradients are wanted.
            needs_current: whether a gradient goes further back.
        """
        following, current = self._at(depth, step.where)
        gradient, passed = self.take_gradients()
        # What is changed in place is lost to a second backward, also where this one fails midway.
        self._streams = None
        beta = self._coupling.beta
        compares = depth == self.bottom and self.witness is not None
        rebuilt = _own(following) if compares or depth != self.bottom else None
        del following
        if needs_current:
            passed = gradient * beta if passed is gradient else _own(passed)
        found = step.replay(current, rebuilt, gradient, passed if needs_current else None, wanted)
        if needs_current:
            self._gradients = passed, gradient if beta == 1 else _own(gradient).mul_(beta)
        if compares:
            assert self.witness is not None
            assert rebuilt is not None
            self.witness.compare(current, rebuilt)
        elif rebuilt is not None:
            self.hold(depth - 1, current, rebuilt)
        return found

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        """Take the gradients of the two streams off the tape."""
        assert self._gradients is not None
        taken, self._gradients = self._gradients, None
        return taken

    def _at(self, depth: int, where: str) -> tuple[Tensor, Tensor]:
        if self._streams is None or self._depth != depth:
            raise ReversibleError(
                f"{where} was asked for a second backward of one forward, but a reversible stage "
                "rebuilds its activations once. Run the forward again, ask for all gradients in "
                "one call, or call set_reversible(model, False) to store activations."
            )
        if tuple(map(version_of, self._streams)) != self._versions:
            raise ReversibleError(
                f"{where}: the input of the stage was modified in place after its forward. "
                "Use the out-of-place form of that operation."
            )
        return self._streams


def _own(x: Tensor) -> Tensor:
    """Return the tensor if nobody else holds its memory, otherwise a copy."""
    return x if alone(x) else x.clone()


def no_gradients_of_gradients(where: str) -> None:
    """Refuse a backward that is recorded itself.

    Raises:
        ReversibleError: if gradients are on.
    """
    if torch.is_grad_enabled():
        raise ReversibleError(
            f"{where}: gradients of gradients (create_graph=True) do not pass "
            "through a reversible stage. Call set_reversible(model, False)."
        )


# Beside the tensors, not on them: a tensor that is pickled or sent takes its attributes along.
_REBUILDS: MutableMapping[Tensor, tuple[Callable[[], Tensor], int, "PartOf | None"]] = (
    WeakTensorKeyDictionary()
)

PartOf = Callable[[Callable[[Tensor], Tensor]], Tensor]
"""Function that rebuilds what another function takes of a tensor, and nothing else."""


def rebuildable(
    tensor: Tensor, rebuild: Callable[[], Tensor], part: PartOf | None = None
) -> Tensor:
    """Note how the values of a tensor can be computed again, so that no stage need keep them.

    Modules that are recomputed in the backward pass get their input in this way: the merged streams
    of the stage before, or frames that are normalised anew from ``uint8``.

    Args:
        tensor: the tensor. The note does not count once it is modified in place.
        rebuild: function that returns the same values, bit for bit, until the backward pass has
            passed here.
        part: function that does so for what `part_of` takes; by default it takes that of the whole.

    Returns:
        ``tensor`` itself.
    """
    _REBUILDS[tensor] = rebuild, version_of(tensor), part
    return tensor


def rebuild_of(tensor: Tensor) -> Callable[[], Tensor] | None:
    """Look up the function given to `rebuildable`; None if the tensor's values must be kept."""
    rebuild, version, _ = _REBUILDS.get(tensor, (None, 0, None))
    return rebuild if version == version_of(tensor) else None


def part_of(tensor: Tensor, take: Callable[[Tensor], Tensor]) -> Tensor:
    """Take a part of a tensor. It is `rebuildable`, and keeps nothing, where the tensor is.

    Args:
        tensor: the tensor.
        take: function that returns the part, such as a slice.
    """
    rebuild = rebuild_of(tensor)
    part = take(tensor)
    if rebuild is None:
        return part
    rebuild_part = _REBUILDS[tensor][2]
    if rebuild_part is None:
        return rebuildable(part, lambda: take(rebuild()))
    return rebuildable(part, partial(rebuild_part, take))


# A tensor's name stands in the frames of all that called with it, which keep its memory.
_SPENT: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()


def spent(tensor: Tensor) -> Tensor:
    """Note that nobody reads a tensor after the stage or recomputed module that gets it next.

    That one gives its memory back at once, where it needs no more of it, and leaves values in its
    place that are not numbers. Without the note the callers' own variables would keep it.

    Args:
        tensor: the tensor, for a module without hooks.

    Returns:
        ``tensor`` itself.
    """
    if isinstance(tensor, Tensor):
        _SPENT[tensor] = version_of(tensor)
    return tensor


def give_up(tensor: Tensor) -> None:
    """Give the memory of a `spent` tensor back."""
    if _SPENT.pop(tensor, None) == version_of(tensor):
        tensor.data = tensor.new_full((), math.nan).expand(tensor.shape)


def version_of(tensor: Tensor) -> int:
    """Count the modifications in place; 0 for inference tensors, which do not count them."""
    return 0 if tensor.is_inference() else tensor._version
