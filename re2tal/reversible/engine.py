"""Engine: one autograd node per step, and a tape that the backward rewinds from node to node.

The forward of a stage with ``n`` steps stores nothing per step. At its end the tape holds the last
two streams, ``x_n`` and ``x_{n-1}``. The gradient ``g`` of the stage's output starts the backward,

    g_n = g / (1 + beta),    g_{n-1} = beta g / (1 + beta).

The backward of step ``i = n ... 1`` finds on the tape ``x_i`` and ``x_{i-1}``, and their gradients:
``g_i``, which is complete, and ``g_{i-1}``, which lacks the part through branch ``i``. It replays
the increment ``u_i = a_i(F_i(x_{i-1}) + alpha x_{i-1})`` piece by piece, with gradients. It changes
the four tensors in place,

    x_{i-2} = (x_i - u_i) / beta           in the memory of x_i
    g_{i-1} += (du_i / dx_{i-1})^T g_i
    g_{i-2} = beta g_i                     in the memory of g_i; step i - 1 adds the rest

so that these four and one piece are all that is alive. The input is both ``x_0`` and ``x_{-1}``, so
its gradient is ``g_0 + g_{-1}``. The gradients ``(du_i / dtheta_i)^T g_i`` of the parameters are
returned to autograd step by step: hooks and DDP see them as those of any other node.

Nodes pass an empty token to each other, which keeps the steps in order in autograd's graph. Streams
and their gradients stay on the tape, so autograd never holds a tensor that is changed in place. If
something else holds one, as a hook inside a branch may, the reference count of its memory shows it:
the engine then changes a copy, and the holder keeps the values. The equations are in `coupling`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from re2tal.reversible.coupling import Coupling, Grid, Settings, stream_dtype
from re2tal.reversible.layouts import by_stride
from re2tal.reversible.replay import ReversibleError, uncached
from re2tal.reversible.step import ReversibleStep, Step, reversible_steps
from re2tal.reversible.tensors import alone, give_up, rebuildable, version_of
from re2tal.reversible.watch import Watch, Witness


def run_stage(
    steps: Sequence[Step], x: Tensor, settings: Settings, watch: Watch, where: str
) -> Tensor:
    """Run the steps of one stage.

    Args:
        steps: the steps in order.
        x: the stage's input, ``(B, ...)`` of a floating dtype.
        settings: settings of the stage.
        watch: watch of the stage's container; it decides whether activations may be rebuilt.
        where: name of the stage in the model, for errors.

    Returns:
        The merged streams, of the shape and dtype of ``x``.

    Raises:
        ReversibleError: under `torch.jit.trace` or `torch.func` transforms, which cannot be
            replayed, for an argument that needs a gradient of its own, or for what a check of an
            earlier backward found.
    """
    if torch.jit.is_tracing():
        raise ReversibleError(no_torchscript(where))
    watch.poll()
    stream = x.to(stream_dtype(x.dtype))
    if stream.ndim <= 3:
        # (B, N, C) tokens from a patch embedding are a transposed view of a convolution's result.
        # Increments are contiguous, so `x_{i-2}` could not become `x_i` in place. Inputs with more
        # dimensions keep their memory format, by which convolutions choose kernels.
        stream = stream.contiguous()
    if stream.numel() == 0:  # nothing to rebuild, and no largest value
        return _stored(steps, stream, settings.coupling, None).to(x.dtype)
    grid = None if settings.grid is None else Grid.of(settings.grid, stream)
    if grid is not None:
        # Adding zero turns -0.0 into 0.0: inverting a step yields (-0.0 + u) - u = 0.0.
        stream = grid.round(stream).add_(0.0)
    transformed = torch._C._are_functorch_transforms_active()
    tape = _Tape(settings.coupling, where, steps)
    if not torch.is_grad_enabled() and not transformed and not torch.compiler.is_exporting():
        # A float32 input is `stream` itself. As a tensor of its own it shares the caller's memory,
        # which `alone` notices, so that no step overwrites the input.
        stream = stream.detach()
        tape.hold(0, stream, stream)
        del stream  # else it would live until the stage's end
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
            # First step that trains or whose input needs a gradient: the backward ends here, so
            # these are the streams that it will have rebuilt last.
            tape.bottom = depth
            tape.witness = watch.witness(*tape.streams, settings, where)
        token = _StepNode.apply(one, tape, depth, token, *one.parameters)
        extent.see(tape.streams[0])
    largest = extent.judge()
    if tape.witness is not None:
        tape.witness.largest = largest
    result: Tensor = _Leave.apply(tape, x.dtype, token)
    return rebuildable(result, partial(tape.merged, x.dtype)) if tape.bottom else result


def no_torchscript(where: str) -> str:
    """Return the message of the error with which TorchScript is refused."""
    return (
        f"{where} is a reversible stage, which TorchScript (torch.jit) cannot record. Use "
        "torch.export.export(model, inputs), whose program computes the same as the model; or "
        "call unwire(model), which restores the network as it was before rewire."
    )


def leaf_of_trace(module: nn.Module, x: Proxy, *args: Any, **kwargs: Any) -> Any:
    """Record a call of a module as one node of the graph that torch.fx traces.

    Tools such as torchvision's `create_feature_extractor` thus work on a rewired model, down to its
    stages. They cannot look inside a stage, whose intermediate results no longer exist when it has
    run.
    """
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *args), kwargs)


def _stored(steps: Sequence[Step], stream: Tensor, coupling: Coupling, grid: Grid | None) -> Tensor:
    # Gradients must be summed in the order of the reversible run, because that decides the last
    # bit. Two aliases of the input: autograd completes g_0 and g_{-1} before it adds them. An alias
    # in each step: it sums all uses of x_{i-1} inside the branch before it adds that sum to the
    # part from the skip connection.
    current, previous = _alias(stream), _alias(stream)
    for step in steps:
        with uncached():
            increment = step.increment(_alias(current))
        if grid is not None:
            increment = grid.round(increment)
        current, previous = coupling.advance(increment, previous), current
    order = by_stride(current)
    return coupling.merge(_Formatted.apply(order, current), _Formatted.apply(order, previous))


def _alias(x: Tensor) -> Tensor:
    # Not view_as(): for a batch of one it changes the stride, which loses the memory format.
    alias: Tensor = torch.ops.aten.alias(x)
    return alias


class _Formatted(torch.autograd.Function):
    """Identity whose backward gives the gradient the memory format of the stream, as the tape does.

    PyTorch may choose kernels by the format of a gradient.
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


def _formatted(x: Tensor, order: Sequence[int]) -> Tensor:
    """Return a tensor in a memory format, without a copy if it already has that format."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(*order).contiguous().permute(*back)


class _Enter(torch.autograd.Function):
    """Entry of a stage: its input goes on the tape, and the gradient of its input comes off.

    That gradient is ``g_0 + g_{-1}``, because the input is both ``x_0`` and ``x_{-1}``.
    """

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
    """Step ``i``: the forward advances the tape, the backward rewinds it.

    Parameters are inputs of the node, so that autograd, hooks and DDP see their gradients.
    """

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
        needs_current, *needs_parameters = ctx.needs_input_grad[3:]  # token, parameters
        wanted = [p for p, needed in zip(step.parameters, needs_parameters, strict=True) if needed]
        found = iter(tape.rewind(ctx.depth, step, wanted, needs_current=needs_current))
        return (
            *(None, None, None),
            tokens[0] if needs_current else None,
            *(next(found) if needed else None for needed in needs_parameters),
        )


class _Leave(torch.autograd.Function):
    """Exit of a stage: the forward merges the streams, the backward puts ``g_n`` on the tape."""

    @staticmethod
    def forward(ctx: Any, tape: "_Tape", dtype: torch.dtype, token: Tensor) -> Tensor:
        ctx.tape, ctx.token = tape, token.detach()
        return tape.merged(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        ctx.tape.begin(gradients[0])
        return None, None, ctx.token


class _Tape:
    """Two streams of one run of a stage, at the step that its forward or backward has reached.

    Args:
        coupling: coupling of the stage.
        where: name of the stage in the model, for errors.
        steps: steps of the stage.

    Attributes:
        bottom: first step that has a backward, counted from 1; no step below it is rewound. 0 if no
            step has one.
        witness: fingerprint of the streams below the bottom; None if they are not compared.
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
        """Streams ``x_depth`` and ``x_{depth-1}``."""
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
            compute: `Step.advance` or `ReversibleStep.forward`.
        """
        # At depth 0 both streams are one tensor, and `x_0` is still needed: nothing is overwritten.
        (current, previous), self._streams = self.streams, None
        overwrite = previous is not current and alone(previous)
        self.hold(self._depth + 1, compute(current, previous, overwrite=overwrite), current)

    def merged(self, dtype: torch.dtype) -> Tensor:
        """Compute the stage's output from its last two streams.

        Raises:
            ReversibleError: if the backward has already rewound the tape from there.
        """
        return self._coupling.merge(*self._at(self._end, f"A module after {self._where}")).to(dtype)

    def begin(self, gradient: Tensor) -> None:
        """Begin the backward with the gradient of the stage's output.

        Raises:
            ReversibleError: for a second backward, or for gradients of gradients.
        """
        no_gradients_of_gradients(self._last)
        current, _ = self._at(self._end, self._last)
        to_last = torch.empty_like(current).copy_(gradient).mul_(self._coupling.share)
        # g_{n-1} = beta g_n: `rewind` makes it, in memory of its own, when it adds to it.
        self._gradients = to_last, to_last

    def rewind(
        self, depth: int, step: ReversibleStep, wanted: Sequence[Tensor], *, needs_current: bool
    ) -> list[Tensor | None]:
        """Go one step back, and return the gradients of its wanted parameters.

        Args:
            depth: number of the step.
            step: the step.
            wanted: parameters whose gradients are wanted.
            needs_current: whether the step's input ``x_{depth-1}`` needs a gradient.
        """
        following, current = self._at(depth, step.where)
        gradient, passed = self.take_gradients()
        # From here on the streams are changed in place. A second backward must not find them, even
        # if this one fails midway.
        self._streams = None
        beta = self._coupling.beta
        # Below the bottom nothing is rebuilt, except to compare.
        compares = depth == self.bottom and self.witness is not None
        rebuilt = _own(following) if compares or depth != self.bottom else None
        del following
        if needs_current:
            # In the first step back the tape holds g_n twice: see `begin`.
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
    """Refuse a backward with ``create_graph=True``.

    Raises:
        ReversibleError: if autograd records operators now.
    """
    if torch.is_grad_enabled():
        raise ReversibleError(
            f"{where}: gradients of gradients (create_graph=True) do not pass "
            "through a reversible stage. Call set_reversible(model, False)."
        )
