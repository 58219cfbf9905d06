"""The engine: one autograd node a step, and a tape that is rewound from node to node.

The forward of a stage stores nothing per step. At its end the tape holds the last two streams. The
backward of step ``i`` finds ``x_i`` and ``x_{i-1}`` on the tape, replays ``F_i(x_{i-1})`` with
gradients, rewinds the tape to ``x_{i-1}`` and ``x_{i-2}``, and returns the gradients of both
streams and of its parameters to autograd. So parameter gradients leave step by step, hooks and DDP
see them as they see those of any other node, and the activations of a branch live only while it is
differentiated. The equations are in `coupling`.
"""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.weak import WeakTensorKeyDictionary

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
    if stream.numel() == 0:  # nothing to rebuild, and no largest value
        return _stored(steps, stream, settings.coupling, None).to(x.dtype)
    grid = None if settings.grid is None else Grid.of(settings.grid, stream)
    if grid is not None:
        # Adding zero makes -0.0 into 0.0, which is what the way back would yield.
        stream = grid.round(stream).add_(0.0)
    if not torch.is_grad_enabled() or watch.stores(steps, stream, settings, where):
        return _stored(steps, stream, settings.coupling, grid).to(x.dtype)
    if torch._C._are_functorch_transforms_active():
        raise ReversibleError(
            "A reversible stage cannot run under torch.func transforms (grad, vmap, jvp, ...). "
            "Call set_reversible(model, False)."
        )
    for step in steps:
        step.refuse_other_gradients()
    return _reversible(steps, stream, settings, grid, watch, where, x.dtype)


def leaf_of_trace(module: nn.Module, x: Proxy, *args: Any, **kwargs: Any) -> Any:
    """Enter a call of a module into the graph that torch.fx traces, without looking inside.

    So tools such as torchvision's `create_feature_extractor` work on a rewired model, down to its
    stages: nothing inside a stage exists once it has run.
    """
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *args), kwargs)


def _stored(steps: Sequence[Step], stream: Tensor, coupling: Coupling, grid: Grid | None) -> Tensor:
    current, previous = _both_streams(stream)
    for step in steps:
        # An alias sums the gradients of all uses inside the branch before the others are added: as
        # in the reversible run, and the order of summation decides about the last bit.
        with uncached():
            increment = step.increment(_alias(current))
        if grid is not None:
            increment = grid.round(increment)
        current, previous = coupling.advance(increment, previous), current
    return coupling.merge(current, previous)


def _reversible(
    steps: Sequence[Step],
    stream: Tensor,
    settings: Settings,
    grid: Grid | None,
    watch: Watch,
    where: str,
    dtype: torch.dtype,
) -> Tensor:
    coupling = settings.coupling
    tape = _Tape(coupling)
    current, previous = _both_streams(stream)
    extent = watch.extent(grid, stream, where)
    for depth, step in enumerate(reversible_steps(steps, stream, grid), start=1):
        following = _StepNode.apply(step, tape, depth, current, previous, *step.parameters)
        if following.requires_grad and not tape.bottom:
            tape.bottom = depth
            tape.witness = watch.witness(current, previous, settings, where)
        extent.see(following)
        current, previous = following, current
    largest = extent.judge()
    if tape.witness is not None:
        tape.witness.largest = largest
    result = coupling.merge(current, previous).to(dtype)
    if tape.bottom:
        tape.hold(len(steps), current, previous)

        def merged() -> Tensor:
            return coupling.merge(*tape.at(len(steps), f"What follows {where}")).to(dtype)

        rebuildable(result, merged)
    return result


def _both_streams(stream: Tensor) -> tuple[Tensor, Tensor]:
    """``x_0`` and ``x_{-1}``, whose gradients are summed apart and only then to the stage's input.

    The order of summation is thus the same whether activations are stored or rebuilt.
    """
    return _alias(stream), _alias(stream)


def _alias(x: Tensor) -> Tensor:
    # view_as() would give a batch of one another stride, and lose the memory format with it.
    alias: Tensor = torch.ops.aten.alias(x)
    return alias


class _StepNode(torch.autograd.Function):
    """``x_i`` from ``x_{i-1}``, ``x_{i-2}`` and the parameters of branch ``i``."""

    @staticmethod
    def forward(
        ctx: Any,
        step: ReversibleStep,
        tape: "_Tape",
        depth: int,
        current: Tensor,
        previous: Tensor,
        *_parameters: Tensor,
    ) -> Tensor:
        ctx.step, ctx.tape, ctx.depth = step, tape, depth
        return tape.coupling.advance(step.forward(current), previous)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        step: ReversibleStep = ctx.step
        tape: _Tape = ctx.tape
        no_gradients_of_gradients(step.where)
        needs_current, _, *needs_parameters = ctx.needs_input_grad[3:]
        wanted = [p for p, needed in zip(step.parameters, needs_parameters, strict=True) if needed]
        _, current = tape.at(ctx.depth, step.where)
        found = step.replay(current, gradient, wanted, to_input=needs_current)
        tape.rewind(ctx.depth, step.where, found.increment, owned=found.owned)
        remaining = iter(found.to_parameters)
        return (
            *(None, None, None),
            found.to_input,
            tape.coupling.skip_gradient(gradient),
            *(next(remaining) if needed else None for needed in needs_parameters),
        )


class _Tape:
    """The two streams of one forward at the depth which its backward has reached.

    Attributes:
        coupling: the coupling of the forward.
        bottom: first step that has a backward; nothing below it needs rebuilding. 0 for none.
        witness: memory of the streams below the bottom; None if they are not compared.
    """

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self.bottom = 0
        self.witness: Witness | None = None
        self._depth = 0
        self._streams: tuple[Tensor, Tensor] | None = None
        self._versions: tuple[int, int] = (0, 0)

    def hold(self, depth: int, current: Tensor, previous: Tensor) -> None:
        """Hold ``x_depth`` and ``x_{depth-1}``, and let go of the streams held before."""
        # Detached: a stream that knew its node would keep the node, and thus this tape, alive.
        self._depth = depth
        self._streams = current.detach(), previous.detach()
        self._versions = current._version, previous._version

    def at(self, depth: int, where: str) -> tuple[Tensor, Tensor]:
        """Return ``x_depth`` and ``x_{depth-1}``.

        Raises:
            ReversibleError: if the tape is elsewhere, which a second backward brings about, or if
                a stream was modified in place.
        """
        if self._streams is None or self._depth != depth:
            raise ReversibleError(
                f"{where} was asked for a second backward of one forward, but a reversible stage "
                "rebuilds its activations once. Run the forward again, ask for all gradients in "
                "one call, or call set_reversible(model, False) to store activations."
            )
        current, previous = self._streams
        if (current._version, previous._version) != self._versions:
            raise ReversibleError(
                f"{where}: the input of the stage was modified in place after its forward. "
                "Use the out-of-place form of that operation."
            )
        return current, previous

    def rewind(self, depth: int, where: str, increment: Tensor, *, owned: bool) -> None:
        """Go back by one step, or let go of the streams at the bottom."""
        following, current = self.at(depth, where)
        at_bottom = depth == self.bottom
        if at_bottom and self.witness is None:
            self._streams = None
            return
        previous = self.coupling.rewind(increment, following, overwrite=owned)
        if at_bottom:
            assert self.witness is not None
            self.witness.compare(current, previous)
            self._streams = None
        else:
            self.hold(depth - 1, current, previous)


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
_REBUILDS: MutableMapping[Tensor, tuple[Callable[[], Tensor], int]] = WeakTensorKeyDictionary()


def rebuildable(tensor: Tensor, rebuild: Callable[[], Tensor]) -> Tensor:
    """Note how the values of a tensor can be computed again, so that no stage need keep them.

    Modules that are recomputed in the backward pass get their input in this way: the merged streams
    of the stage before, or frames that are normalised anew from ``uint8``.

    Args:
        tensor: the tensor. The note does not count once it is modified in place.
        rebuild: function that returns the same values, bit for bit, until the backward pass has
            passed here.

    Returns:
        ``tensor`` itself.
    """
    _REBUILDS[tensor] = rebuild, version_of(tensor)
    return tensor


def rebuild_of(tensor: Tensor) -> Callable[[], Tensor] | None:
    """Look up the function given to `rebuildable`; None if the tensor's values must be kept."""
    rebuild, version = _REBUILDS.get(tensor, (None, 0))
    return rebuild if version == version_of(tensor) else None


def version_of(tensor: Tensor) -> int:
    """Count the modifications in place; 0 for inference tensors, which do not count them."""
    return 0 if tensor.is_inference() else tensor._version
