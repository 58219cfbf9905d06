"""How well a coupling that divides by beta can be run backwards: measured, not assumed.

The way back of Dr2Net, ``x_{i-2} = (x_i - F_i(x_{i-1}) - alpha x_{i-1}) / beta``, multiplies the
rounding errors of every branch by ``1 / beta`` and by how strongly the branches react. While alpha
and beta move over training the answer changes, so a stage is tried out whenever alpha has moved by
a twentieth, or beta by a twentieth of itself.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from re2tal.reversible.call import BranchCall
from re2tal.reversible.randomness import GeneratorStates
from re2tal.reversible.replay import counts_statistics, statistics_kept
from re2tal.reversible.settings import Settings
from re2tal.reversible.step import steps_of

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
