"""Nothing trains silently on wrong activations: what is rebuilt is compared with what was there.

Each stage keeps a few numbers about its input: in exact mode a sum over all of its bits, otherwise
a sample of its values. At the end of its backward they are compared with the rebuilt input. On a
GPU the verdict travels to the host while the device works on, and is read when it has arrived: at
the next forward of the stage, or at once by `check`.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from re2tal.reversible.coupling import TOLERANCE, Grid, Settings
from re2tal.reversible.replay import (
    GeneratorStates,
    ReversibleError,
    counts_statistics,
    statistics_kept,
)
from re2tal.reversible.step import BranchCall, steps_of

_STEP = 0.05


def gate_key(
    settings: Settings, stream: Tensor, calls: Sequence[BranchCall], where: str
) -> tuple[Any, ...]:
    """What a measurement holds for."""
    coupling = settings.coupling
    precision = torch.get_autocast_dtype(stream.device.type)
    if not torch.is_autocast_enabled(stream.device.type):
        precision = stream.dtype
    return (
        where,
        len(calls),
        round(coupling.alpha / _STEP),
        round(math.log(coupling.beta) / _STEP),  # the error grows with powers of 1 / beta
        precision,
        tuple(m.training for call in calls for m in call.branch.modules),
    )


@torch.no_grad()
def reconstruction_error(calls: Sequence[BranchCall], stream: Tensor, settings: Settings) -> float:
    """Run a stage forward and back again, without a trace.

    Args:
        calls: its branches.
        stream: its input.
        settings: with the coupling to try.

    Returns:
        The relative error (root mean square) of the rebuilt input; infinite if it is not finite.
    """
    modules = {m for call in calls for top in call.branch.modules for m in top.modules()}
    counted = [(m, name) for m in modules if counts_statistics(m) for name in m._buffers]
    coupling, stream = settings.coupling, stream.detach()
    steps = steps_of(calls, stream, grid=None)
    devices = {stream.device, *(p.device for step in steps for p in step.parameters)}
    with ExitStack() as stack:
        stack.enter_context(GeneratorStates.now(devices).revisited())
        stack.enter_context(statistics_kept(counted))
        current, previous = stream, stream
        for step in steps:
            increment = step.first(current)
            current, previous = coupling.advance(increment, previous), current
        last = current.double().norm()
        for step in reversed(steps):
            increment = step.again(previous, None).increment
            current, previous = previous, coupling.rewind(increment, current)
    # An input of zeros is measured by what the stage made of it.
    size = stream.double().norm() if bool(stream.any()) else last
    worst = max(float(difference(x, stream) / size) for x in (current, previous))
    return math.inf if math.isnan(worst) else worst


def difference(found: Tensor, truth: Tensor) -> Tensor:
    """The norm of a difference, as a tensor."""
    return (found - truth).double().norm()


_LOG = logging.getLogger(__name__)
_SAMPLE = 2**16


class Watch:
    """Checks and measurements of one container; a copy or an unpickled one starts anew.

    Attributes:
        errors: for each stage, by place, the relative error (root mean square) of the last input
            that it rebuilt, as a tensor on the device; 0 in exact mode.
        modes: for each stage, by place, how it ran last: "reversible" or "stored: why".
    """

    def __init__(self) -> None:
        self.errors: dict[str, Tensor | float] = {}
        self.modes: dict[str, str] = {}
        self._pending: list[_Verdict] = []
        self._measured: dict[Any, float] = {}
        self._left_at: str | None = None

    def __reduce__(self) -> Any:
        return Watch, ()

    def __deepcopy__(self, memo: object) -> "Watch":
        return Watch()

    def poll(self, *, wait: bool = False) -> None:
        """Read the verdicts that have arrived, or wait for all of them.

        Raises:
            ReversibleError: for the first that is not good.
        """
        while self._pending and (wait or self._pending[0].arrived()):
            self._pending.pop(0).read()

    def begins(self) -> None:
        """A stage is run whose blocks are called one by one.

        Raises:
            ReversibleError: if the last one was left before its end.
        """
        left_at, self._left_at = self._left_at, None
        if left_at is not None:
            raise ReversibleError(
                f"A reversible stage was left after its block {left_at}, but it had run to its "
                "end: all of its blocks run when the first is called. Call unwire(model) to leave "
                "it early. (If that forward ended in an error of its own, just go on.)"
            )

    def left_at(self, name: str, *, at_end: bool) -> None:
        """The block of this name has passed the stage's result on."""
        self._left_at = None if at_end else name

    def forget(self, where: str) -> None:
        """Try a stage's coupling out anew at its next forward."""
        self._measured = {key: e for key, e in self._measured.items() if key[0] != where}

    def stores(
        self, calls: Sequence[BranchCall], stream: Tensor, settings: Settings, where: str
    ) -> bool:
        """Whether this stage stores its activations now; notes and logs the reason.

        A coupling that divides by beta is tried out on the stream at hand.
        """
        reason = settings.stored_because()
        if reason is None and self._inexact(settings) and not isinstance(stream, FakeTensor):
            key = gate_key(settings, stream, calls, where)
            if key not in self._measured:
                self._measured[key] = reconstruction_error(calls, stream, settings)
            error = self._measured[key]
            if not error <= TOLERANCE:
                reason = f"rebuilding would be off by {error:.1e}, more than {TOLERANCE:.0e}"
        self.note(where, "reversible" if reason is None else f"stored: {reason}", settings)
        return reason is not None

    def note(self, where: str, mode: str, settings: Settings) -> None:
        """Note how a stage runs, and log it if that is new."""
        if self.modes.get(where) != mode:
            self.modes[where] = mode
            weights = f"alpha={settings.coupling.alpha:g}, beta={settings.coupling.beta:g}"
            _LOG.info("%s: %s (%s)", where or "model", mode, weights)

    def extent(self, grid: Grid | None, stream: Tensor, where: str) -> "Extent":
        """What watches the magnitude of a forward's streams."""
        return Extent(self, grid, stream, where)

    def witness(
        self, current: Tensor, previous: Tensor, settings: Settings, where: str
    ) -> "Witness | None":
        """What remembers the streams at the bottom of a tape; None if nothing is to be compared."""
        if not settings.verify or isinstance(current, FakeTensor):
            return None
        return Witness(self, current, previous, settings, where)

    def post(self, verdict: "_Verdict") -> None:
        """Take a verdict in, to be read when it has arrived."""
        self._pending.append(verdict)
        self.poll()

    @staticmethod
    def _inexact(settings: Settings) -> bool:
        coupling = settings.coupling
        return not settings.exact and (coupling.alpha != 0 or coupling.beta != 1)


class Extent:
    """The largest magnitude of the streams of one forward on the grid."""

    def __init__(self, watch: Watch, grid: Grid | None, stream: Tensor, where: str) -> None:
        self._watch = watch
        self._grid = None if isinstance(stream, FakeTensor) else grid
        self._where = where
        self._largest: list[Tensor] = []
        self.see(stream)

    def see(self, stream: Tensor) -> None:
        """Take in one more stream."""
        if self._grid is not None:
            self._largest += torch.aminmax(stream.detach())

    def judge(self) -> Tensor | None:
        """Compare with what the grid can hold; returns the largest magnitude there was."""
        if self._grid is None:
            return None
        largest = torch.stack(self._largest).abs().amax().double()
        limit = torch.as_tensor(self._grid.limit, dtype=largest.dtype, device=largest.device)
        # Values that are not finite show in the loss; they are no matter of the grid.
        bad = torch.isfinite(largest) & (largest >= limit)
        self._watch.post(_Verdict(torch.stack([bad.double(), largest, limit]), self._refuse))
        return largest

    def _refuse(self, largest: float, limit: float) -> None:
        bits = 24 - math.ceil(math.log2(largest))
        raise ReversibleError(
            f"{self._where or 'The stage'}: a stream reached {largest:.4g}, beyond the {limit:g} "
            f"that its grid can hold exactly. Call rewire(model, grid={bits - 2}) (or smaller), or "
            "exact=False."
        )


class Witness:
    """Remembers the streams ``x_{d-1}`` and ``x_{d-2}`` below the first branch ``d`` of a tape.

    Attributes:
        largest: the largest magnitude of the forward's streams, once it is known.
    """

    largest: Tensor | None = None

    def __init__(
        self, watch: Watch, current: Tensor, previous: Tensor, settings: Settings, where: str
    ) -> None:
        self._watch = watch
        self._exact = settings.exact
        self._where = where
        self._read = _bits if self._exact else _sample
        before = self._read(previous)
        same = current.data_ptr() == previous.data_ptr()  # at the stage's input
        self._before = before if same else self._read(current), before

    def compare(self, current: Tensor, previous: Tensor) -> None:
        """Compare with the rebuilt ones."""
        pairs = list(zip((self._read(current), self._read(previous)), self._before, strict=True))
        if not self._exact:
            errors = [difference(a, b) / b.double().norm() for a, b in pairs]
            error = self._watch.errors[self._where] = torch.stack(errors).amax()
            bad = (error > TOLERANCE) | error.isnan()
            verdict = torch.stack([bad.to(error.dtype), error, error])
            self._watch.post(_Verdict(verdict, self._forget))
            return
        self._watch.errors[self._where] = 0.0
        bad = torch.stack([a != b for a, b in pairs]).any().double()
        # A stream that is not finite cannot be rebuilt, but then the loss is not finite either.
        assert self.largest is not None
        finite = torch.isfinite(self.largest)
        self._watch.post(_Verdict(torch.stack([bad * finite, bad, bad]), self._refuse))

    def _forget(self, *_: float) -> None:
        self._watch.forget(self._where)

    def _refuse(self, *_: float) -> None:
        raise ReversibleError(
            f"{self._where or 'The stage'}: the rebuilt input is not the one of the forward, so "
            "gradients would be wrong. Likely causes: a branch that is not deterministic (a kernel "
            "that adds in any order, randomness that PyTorch does not generate), one that depends "
            "on something that changed since its forward, or a stream that left the grid midway "
            "(rewire with a smaller grid). To train on, call set_reversible(model, False)."
        )


class _Verdict:
    """Whether something went wrong, and two numbers about it, on their way to the host."""

    def __init__(self, answer: Tensor, if_so: Callable[[float, float], None]) -> None:
        self._if_so = if_so
        self._event: torch.cuda.Event | None = None
        if answer.device.type == "cuda":
            self._answer = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
            self._answer.copy_(answer, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(answer.device))
        else:
            self._answer = answer.cpu()

    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def read(self) -> None:
        if self._event is not None:
            self._event.synchronize()
        bad, *numbers = self._answer.tolist()
        if bad:
            self._if_so(*numbers)


def _bits(stream: Tensor) -> Tensor:
    """The sum of the bit patterns, which any bit changes, whatever the order of summation."""
    whole = {4: torch.int32, 8: torch.int64}[stream.element_size()]
    return stream.detach().view(whole).sum(dtype=torch.int64)


def _sample(stream: Tensor) -> Tensor:
    flat = stream.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)].clone()
