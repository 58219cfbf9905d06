"""The engine: one autograd node a branch, and a tape that is rewound from node to node.

The forward of a stage stores nothing per branch. At its end the tape holds the last two streams.
The backward of branch ``i`` finds ``x_i`` and ``x_{i-1}`` on the tape, repeats ``F_i(x_{i-1})``
with gradients, rewinds the tape to ``x_{i-1}`` and ``x_{i-2}``, and returns the gradients of both
streams and of its parameters to autograd. So parameter gradients leave branch by branch, hooks and
DDP see them as they see those of any other node, and the activations of a branch live only while it
is differentiated. The equations are in `streams`.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from re2tal.reversible.branches import Branch, NotReversibleError, split
from re2tal.reversible.replay import Autocast, Replay, ReversibleError, run_branch
from re2tal.reversible.streams import Coupling, stream_dtype

RE2TAL = Coupling(alpha=0.0, beta=1.0)


class Tape:
    """The two streams of one forward at the depth which its backward has reached."""

    def __init__(self) -> None:
        self.bottom = 0  # the first branch that has a backward: nothing below it needs rebuilding
        self._depth = 0
        self._streams: tuple[Tensor, Tensor] | None = None
        self._versions: tuple[int, int] = (0, 0)

    def hold(self, depth: int, current: Tensor, previous: Tensor) -> None:
        """Hold ``x_depth`` and ``x_{depth-1}``, and let go of what was held."""
        # Detached: a stream that knew its node would keep the node, and thus this tape, alive.
        self._depth = depth
        self._streams = current.detach(), previous.detach()
        self._versions = current._version, previous._version

    def release(self) -> None:
        """Let go of the streams: no branch needs them any more."""
        self._streams = None

    def at(self, depth: int, where: str) -> tuple[Tensor, Tensor]:
        """``x_depth`` and ``x_{depth-1}``.

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


class Step:
    """Branch ``i`` of one forward: what its autograd node keeps."""

    def __init__(self, replay: Replay, coupling: Coupling, tape: Tape, depth: int) -> None:
        self.replay = replay
        self.coupling = coupling
        self.tape = tape
        self.depth = depth

    def rebuild(self, needs_gradient: bool) -> tuple[Tensor, Any]:
        """Repeat the branch and rewind the tape by one branch.

        Returns:
            ``x_{i-1}`` as a leaf, and the autograd edge of ``F_i(x_{i-1})`` (None if that depends
            on nothing that needs a gradient). The edge, not the tensor: its values are spent.
        """
        following, current = self.tape.at(self.depth, self.replay.where)
        leaf = current.detach().requires_grad_(needs_gradient)
        with torch.enable_grad():
            result = self.replay.again(leaf)
        if self.depth == self.tape.bottom:
            self.tape.release()
        else:
            previous = self.coupling.rewind(result.detach(), current, following)
            self.tape.hold(self.depth - 1, current, previous)
        return leaf, get_gradient_edge(result) if result.requires_grad else None


class _BranchNode(torch.autograd.Function):
    """``x_i`` from ``x_{i-1}``, ``x_{i-2}`` and the parameters of branch ``i``."""

    @staticmethod
    def forward(
        ctx: Any, step: Step, current: Tensor, previous: Tensor, *_parameters: Tensor
    ) -> Tensor:
        ctx.step = step
        return step.coupling.advance(step.replay.first(current), current, previous)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        step: Step = ctx.step
        if torch.is_grad_enabled():
            raise ReversibleError(
                f"{step.replay.where}: gradients of gradients (create_graph=True) do not pass "
                "through a reversible stage. Call set_reversible(model, False)."
            )
        _, needs_current, _, *needs_parameters = ctx.needs_input_grad
        leaf, edge = step.rebuild(needs_current)
        wanted = [
            p for p, needed in zip(step.replay.parameters, needs_parameters, strict=True) if needed
        ]
        inputs = [leaf, *wanted] if needs_current else wanted
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if edge is not None and inputs:
            with _hooks_paused(wanted):
                found = torch.autograd.grad(edge, inputs, gradient, allow_unused=True)
        remaining = iter(found)
        to_current, to_previous = step.coupling.skip_gradients(gradient)
        if needs_current:
            to_current = _sum(next(remaining), to_current)
        return (
            None,
            to_current,
            to_previous,
            *(next(remaining) if needed else None for needed in needs_parameters),
        )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


@contextmanager
def _hooks_paused(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Keep the parameters' own hooks for the outer backward.

    `torch.autograd.grad` calls them, and autograd will call them again on what a node returns: a
    hook that halves a gradient would quarter it.
    """
    paused = []
    for parameter in parameters:
        hooks: Any = getattr(parameter, "_backward_hooks", None)
        if hooks:
            paused.append((hooks, OrderedDict(hooks)))
            hooks.clear()
    try:
        yield
    finally:
        for hooks, saved in paused:
            hooks.update(saved)


def run_stage(
    found: Sequence[tuple[str, Branch]],
    x: Tensor,
    coupling: Coupling = RE2TAL,
    *,
    store: bool = False,
) -> Tensor:
    """Run the branches of one stage.

    Args:
        found: the branches in order, each with its place in the model for errors.
        x: the stage's input, of any shape and floating dtype.
        coupling: the coefficients. A coupling that cannot be inverted stores activations.
        store: let autograd store the activations of the same function instead of rebuilding them.

    Returns:
        The merged streams, of the shape and dtype of ``x``.

    Raises:
        ReversibleError: under `torch.func` transforms, which cannot be replayed.
    """
    stream = x.to(stream_dtype(x.dtype))
    current, previous = stream, stream
    if store or not coupling.invertible or not torch.is_grad_enabled():
        for where, branch in found:
            result = run_branch(branch, current, x.dtype, where)
            current, previous = coupling.advance(result, current, previous), current
        return coupling.merge(current, previous).to(x.dtype)
    if torch._C._are_functorch_transforms_active():
        raise ReversibleError(
            "A reversible stage cannot run under torch.func transforms (grad, vmap, jvp, ...). "
            "Call set_reversible(model, False)."
        )
    tape, autocast = Tape(), Autocast(x.device)
    for depth, (where, branch) in enumerate(found, start=1):
        step = Step(Replay(branch, x.dtype, autocast, where), coupling, tape, depth)
        following = _BranchNode.apply(step, current, previous, *step.replay.parameters)
        current, previous = following, current
        if following.requires_grad and not tape.bottom:
            tape.bottom = depth
    if tape.bottom:
        tape.hold(len(found), current, previous)
    return coupling.merge(current, previous).to(x.dtype)


class ReversibleSequential(nn.Sequential):
    """An `nn.Sequential` that runs its runs of consecutive residual blocks as reversible stages.

    `rewire` turns a sequential container into one by changing its class, so that it stays the same
    object with the same children, parameter names and hooks. The branches are asked for in every
    forward rather than kept: a copied, unpickled or edited container runs its present children.

    Attributes:
        coupling: alpha and beta of its stages.
        reversible: whether activations are rebuilt (True) or stored (False); the function computed
            is the same.
        rewired: names of the children which take part; the others are called as they are.
        place: name of the container in the rewired model, for errors.
    """

    coupling: Coupling = RE2TAL
    reversible: bool = True
    rewired: frozenset[str] = frozenset()
    place: str = ""

    @classmethod
    def adopt(
        cls, module: nn.Sequential, *, coupling: Coupling, rewired: frozenset[str], place: str
    ) -> None:
        """Turn a container into a rewired one, in place."""
        module.__class__ = cls
        vars(module).update(coupling=coupling, rewired=rewired, place=place)

    def restore(self) -> None:
        """Turn it back into an `nn.Sequential`, in place."""
        for attribute in ("coupling", "reversible", "rewired", "place"):
            vars(self).pop(attribute, None)
        self.__class__ = nn.Sequential  # type: ignore[assignment]

    # Nodes with state cannot be traced: compile the modules inside the blocks.
    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Sequential gives it
        """Call the children in order; each run of rewired ones is one stage.

        Raises:
            ReversibleError: if a rewired child is no longer reversible.
        """
        x, run = input, []
        for name, child in self._modules.items():
            if name in self.rewired:
                run += self._branches(name, child)
                continue
            x, run = self._run(run, x), []
            if child is not None:
                x = child(x)
        return self._run(run, x)

    def _run(self, run: Sequence[tuple[str, Branch]], x: Tensor) -> Tensor:
        return run_stage(run, x, self.coupling, store=not self.reversible) if run else x

    def _branches(self, name: str, child: nn.Module | None) -> list[tuple[str, Branch]]:
        where = f"{self.place}.{name}" if self.place else name
        try:
            return [(f"{where} ({branch.name})", branch) for branch in split(child)]  # type: ignore[arg-type]
        except NotReversibleError as error:
            raise ReversibleError(
                f"Block {where} was rewired, but cannot run reversibly now: {error}."
            ) from error

    def extra_repr(self) -> str:
        """The coupling and the mode, for `print(model)`."""
        mode = "reversible" if self.reversible and self.coupling.invertible else "stored"
        return f"alpha={self.coupling.alpha}, beta={self.coupling.beta}, {mode}"
