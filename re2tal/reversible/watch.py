"""Checks that rebuilt streams are those of the forward, so that no stage trains on wrong ones.

Each stage keeps a fingerprint of its input: in exact mode the sum of all its bits, otherwise a
sample of its values. At the end of the backward it is compared with that of the rebuilt input. On a
GPU the verdict is copied to the host while the device continues. It is read after it has arrived,
at a later forward of the stage, or at once by `check`.

Without a grid, the error of a coupling other than (0, 1) is measured. The inversion

    x_{i-2} = (x_i - F_i(x_{i-1}) - alpha x_{i-1}) / beta

multiplies the rounding errors of every branch by ``1 / beta``, and passes them on through the
branches, which may amplify them as well. The error changes as alpha and beta move over training. So
a stage is measured again whenever alpha has moved by 0.05, or beta by 5 %.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from re2tal.reversible.coupling import TOLERANCE, Grid, Settings
from re2tal.reversible.layouts import by_stride
from re2tal.reversible.replay import (
    GeneratorStates,
    ReversibleError,
    counts_statistics,
    statistics_kept,
)
from re2tal.reversible.step import Step, reversible_steps

_LOG = logging.getLogger(__name__)
_COUPLING_CHANGE = 0.05  # change of alpha, or of log(beta), after which a stage is measured again
_SAMPLE = 2**16  # values of a stream that are compared without a grid


class Watch:
    """Checks and measurements of one container. Copying or unpickling it gives an empty one.

    Attributes:
        errors: relative error of the input that a stage rebuilt last, by the stage's name, as a
            tensor on the device; 0 in exact mode.
        modes: mode in which a stage ran last, by its name: "reversible" or "stored: <reason>".
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
            ReversibleError: for the first check that has failed.
        """
        while self._pending and (wait or self._pending[0].arrived()):
            self._pending.pop(0).read()

    def begins(self) -> None:
        """Record that a stage begins whose blocks are called one by one.

        Raises:
            ReversibleError: if the model left the stage before it early.
        """
        left_at, self._left_at = self._left_at, None
        if left_at is not None:
            raise ReversibleError(
                f"A reversible stage was left after its block {left_at}, but it had run to its "
                "end: all of its blocks run when the first is called. Call unwire(model) to leave "
                "it early. (If that forward ended in an error of its own, just go on.)"
            )

    def left_at(self, name: str, *, at_end: bool) -> None:
        """Record that the block of this name has passed the stage's result on."""
        self._left_at = None if at_end else name

    def forget(self, where: str) -> None:
        """Have a stage's coupling measured again at its next forward."""
        self._measured = {key: e for key, e in self._measured.items() if key[0] != where}

    def stores(self, steps: Sequence[Step], stream: Tensor, settings: Settings, where: str) -> bool:
        """Decide whether a stage stores its activations in this forward, and log the reason.

        A coupling that divides by beta is measured on the given stream, unless that was done
        recently; see `_measurement_key`.
        """
        reason = settings.stored_because()
        if reason is None and self._inexact(settings) and not isinstance(stream, FakeTensor):
            key = _measurement_key(settings, stream, steps, where)
            if key not in self._measured:
                self._measured[key] = reconstruction_error(steps, stream)
            error = self._measured[key]
            if not error <= TOLERANCE:  # also if it is NaN
                reason = f"rebuilding would be off by {error:.1e}, more than {TOLERANCE:.0e}"
        self.note(where, "reversible" if reason is None else f"stored: {reason}", settings)
        return reason is not None

    def note(self, where: str, mode: str, settings: Settings) -> None:
        """Record the mode of a stage, and log it if it is new."""
        if self.modes.get(where) != mode:
            self.modes[where] = mode
            weights = f"alpha={settings.coupling.alpha:g}, beta={settings.coupling.beta:g}"
            _LOG.info("%s: %s (%s)", where or "model", mode, weights)

    def extent(self, grid: Grid | None, stream: Tensor, where: str) -> "_Extent":
        """Begin to track the largest magnitude of a forward's streams."""
        return _Extent(self, grid, stream, where)

    def witness(
        self, current: Tensor, previous: Tensor, settings: Settings, where: str
    ) -> "Witness | None":
        """Take fingerprints of the streams at the bottom of a tape; None if none are compared."""
        if not settings.verify or isinstance(current, FakeTensor):
            return None
        return Witness(self, current, previous, settings, where)

    def post(self, verdict: "_Verdict") -> None:
        """Queue a verdict, and read those that have arrived."""
        self._pending.append(verdict)
        self.poll()

    @staticmethod
    def _inexact(settings: Settings) -> bool:
        coupling = settings.coupling
        return not settings.exact and (coupling.alpha != 0 or coupling.beta != 1)


@torch.no_grad()
def reconstruction_error(steps: Sequence[Step], stream: Tensor) -> float:
    """Run a stage forward and backwards without side effects, and compare its rebuilt input.

    Args:
        steps: steps of the stage.
        stream: input of the stage.

    Returns:
        The larger relative error ``||rebuilt - x|| / ||x||`` of the two streams; infinity for NaN.
    """
    modules = {m for step in steps for top in step.branch.modules for m in top.modules()}
    counted = [(m, name) for m in modules if counts_statistics(m) for name in m._buffers]
    stream = stream.detach()
    reversible = reversible_steps(steps, stream, grid=None)
    devices = {stream.device, *(p.device for step in reversible for p in step.parameters)}
    with GeneratorStates.now(devices).restored(), statistics_kept(counted):
        current, previous = stream, stream
        for step in reversible:
            current, previous = step.forward(current, previous), current
        last = current.double().norm()
        for step in reversed(reversible):
            step.replay(previous, current)  # `current`, which is x_i, becomes x_{i-2}
            current, previous = previous, current
    # Zeros have no relative error: the last stream then gives the scale.
    size = stream.double().norm() if bool(stream.any()) else last
    worst = max(float(_difference(x, stream) / size) for x in (current, previous))
    return math.inf if math.isnan(worst) else worst


def _measurement_key(
    settings: Settings, stream: Tensor, steps: Sequence[Step], where: str
) -> tuple[Any, ...]:
    """Return a key of the runs of a stage for which one measured error holds."""
    coupling = settings.coupling
    precision = torch.get_autocast_dtype(stream.device.type)
    if not torch.is_autocast_enabled(stream.device.type):
        precision = stream.dtype
    return (
        where,
        len(steps),
        round(coupling.alpha / _COUPLING_CHANGE),
        round(
            math.log(coupling.beta) / _COUPLING_CHANGE
        ),  # the error grows with powers of 1 / beta
        precision,
        tuple(m.training for step in steps for m in step.branch.modules),
    )


def _difference(found: Tensor, truth: Tensor) -> Tensor:
    """Compute the norm of a difference, as a tensor on its device."""
    norm: Tensor = (found - truth).double().norm()
    return norm


class _Extent:
    """Tracker of the largest magnitude among the streams of one forward on the grid."""

    def __init__(self, watch: Watch, grid: Grid | None, stream: Tensor, where: str) -> None:
        self._watch = watch
        self._grid = None if isinstance(stream, FakeTensor) else grid
        self._where = where
        self._largest: list[Tensor] = []
        self.see(stream)

    def see(self, stream: Tensor) -> None:
        """Include one more stream."""
        if self._grid is not None:
            self._largest += torch.aminmax(stream.detach())

    def judge(self) -> Tensor | None:
        """Compare the largest magnitude with the grid's limit ``2**(24 - k)``, and return it."""
        if self._grid is None:
            return None
        largest = torch.stack(self._largest).abs().amax().double()
        limit = torch.as_tensor(self._grid.limit, dtype=largest.dtype, device=largest.device)
        # Values that are not finite show in the loss; a smaller grid would not help.
        bad = torch.isfinite(largest) & (largest >= limit)
        self._watch.post(_Verdict(torch.stack([bad.double(), largest, limit]), self._refuse))
        return largest

    def _refuse(self, largest: float, limit: float) -> None:
        bits = 24 - math.ceil(math.log2(largest))  # whose limit is just above; advise two less
        raise ReversibleError(
            f"{self._where or 'The stage'}: a stream reached {largest:.4g}, beyond the {limit:g} "
            f"that its grid can hold exactly. Call rewire(model, grid={bits - 2}) (or smaller), or "
            "exact=False."
        )


class Witness:
    """Fingerprints of the streams ``x_{d-1}`` and ``x_{d-2}`` below the first step ``d`` of a tape.

    Attributes:
        largest: largest magnitude of the forward's streams, once it is known.
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
        # At the stage's input both streams are the same memory: sum it once.
        same = current.data_ptr() == previous.data_ptr()
        self._before = before if same else self._read(current), before

    def compare(self, current: Tensor, previous: Tensor) -> None:
        """Compare the rebuilt streams with those of the forward."""
        pairs = list(zip((self._read(current), self._read(previous)), self._before, strict=True))
        if not self._exact:
            errors = [_difference(a, b) / b.double().norm() for a, b in pairs]
            error = self._watch.errors[self._where] = torch.stack(errors).amax()
            bad = (error > TOLERANCE) | error.isnan()
            verdict = torch.stack([bad.to(error.dtype), error, error])
            self._watch.post(_Verdict(verdict, self._forget))
            return
        self._watch.errors[self._where] = 0.0
        bad = torch.stack([a != b for a, b in pairs]).any().double()
        # A stream with NaN or infinity cannot be rebuilt, but then the loss is not finite either.
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
    """Verdict of a check, with two numbers for its error message, copied to the host.

    On CUDA the copy is asynchronous, into pinned memory; an event tells when it has arrived.
    """

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


_AT_ONCE = 2**18
"""Elements whose bits a CPU sums in one call."""


def _bits(stream: Tensor) -> Tensor:
    """Sum the bit patterns as integers, modulo 2^64.

    One flipped bit changes the sum, and the order of summation does not.
    """
    bits = stream.detach().view({4: torch.int32, 8: torch.int64}[stream.element_size()])
    if bits.device.type != "cpu" or bits.numel() <= _AT_ONCE:
        return bits.sum(dtype=torch.int64)
    # On a CPU sum() first copies its whole input to int64; parts bound that copy.
    parts = bits.permute(by_stride(bits)).reshape(-1).split(_AT_ONCE)
    return torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum()


def _sample(stream: Tensor) -> Tensor:
    flat = stream.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)].clone()
