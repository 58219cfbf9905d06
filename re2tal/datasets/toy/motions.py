"""Thirteen motions on which no weights of this repository were trained: unseen classes.

As in the first set, only the change over time distinguishes them: a quantity that a motion does not
change is held at a random phase, and all paths have about the same extent as in the first set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Random numbers of one instance: `phase`, `amount`, `speed` in [0, 1], `sign` -1 or 1."""

    phase: float
    amount: float
    speed: float
    sign: float

    def cycles(self, t: Floats, slow: float, fast: float) -> Floats:
        """Compute the cycles since time 0, (T,), at a rate between `slow` and `fast` per second."""
        return np.asarray(self.phase + (slow + (fast - slow) * self.speed) * t)

    def reach(self, small: float, large: float) -> float:
        """Return an amplitude between `small` and `large`."""
        return small + (large - small) * self.amount


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Change of the actor's pose at each of T times; None holds a quantity.

    Attributes:
        x: (T,) pixels to the right.
        y: (T,) pixels downwards.
        size: (T,) in [-1, 1], as a share of the amplitude of the size's logarithm.
        turn: (T,) radians, from any origin.
    """

    x: Floats | None = None
    y: Floats | None = None
    size: Floats | None = None
    turn: Floats | None = None


def _wave(cycles: Floats) -> Floats:
    return np.asarray(np.sin(2.0 * pi * cycles))


def _saw(cycles: Floats) -> Floats:
    """Compute a wave that rises slowly in four fifths of a cycle and falls in the last fifth.

    Its values have the same distribution as those of `_wave`.
    """
    share = cycles % 1.0
    rise = np.where(share < 0.8, share / 0.4 - 1.0, 9.0 - 10.0 * share)
    return np.asarray(np.sin(0.5 * pi * rise))


def _steps(cycles: Floats) -> Floats:
    """Compute whole cycles that stand still for two thirds and advance in the last third."""
    share = np.clip(3.0 * (cycles % 1.0) - 2.0, 0.0, 1.0)
    return np.asarray(np.floor(cycles) + share * share * (3.0 - 2.0 * share))


def _eight(t: Floats, draw: Draw) -> Change:
    cycles, reach = draw.sign * draw.cycles(t, 0.5, 0.75), draw.reach(12.0, 16.0)
    return Change(x=reach * _wave(cycles), y=0.8 * reach * _wave(2.0 * cycles))


def _square(t: Floats, draw: Draw) -> Change:
    corner = draw.sign * (_steps(4.0 * draw.cycles(t, 0.4, 0.55)) + 0.5) * pi / 2
    reach = draw.reach(13.0, 17.0)
    return Change(x=reach * np.cos(corner), y=reach * np.sin(corner))


def _dart(t: Floats, draw: Draw) -> Change:
    place = draw.sign * draw.reach(10.0, 14.0) * np.cos(pi * _steps(draw.cycles(t, 1.1, 1.5)))
    return Change(x=place, y=place)


def _lift(t: Floats, draw: Draw) -> Change:
    return Change(y=-draw.reach(12.0, 17.0) * _saw(draw.cycles(t, 0.6, 0.85)))


def _pendulum(t: Floats, draw: Draw) -> Change:
    swing = draw.reach(0.6, 0.85) * _wave(draw.cycles(t, 0.55, 0.8))
    return Change(x=22.0 * np.sin(swing), y=22.0 * np.cos(swing) - 19.0, turn=-swing)


def _spiral(t: Floats, draw: Draw) -> Change:
    cycles = draw.cycles(t, 0.8, 1.1)
    radius = draw.reach(11.0, 14.0) * (1.0 + _wave(0.4 * cycles))
    turned = 2.0 * pi * draw.sign * cycles
    return Change(x=radius * np.cos(turned), y=radius * np.sin(turned))


def _rock(t: Floats, draw: Draw) -> Change:
    return Change(turn=draw.reach(0.6, 0.9) * _wave(draw.cycles(t, 0.8, 1.1)))


def _tremble(t: Floats, draw: Draw) -> Change:
    return Change(turn=draw.reach(0.3, 0.45) * _wave(draw.cycles(t, 2.2, 2.8)))


def _tick(t: Floats, draw: Draw) -> Change:
    return Change(turn=draw.sign * 0.5 * pi * _steps(draw.cycles(t, 1.2, 1.6)))


def _swell(t: Floats, draw: Draw) -> Change:
    return Change(size=_saw(draw.cycles(t, 0.5, 0.75)))


def _shrink(t: Floats, draw: Draw) -> Change:
    return Change(size=-_saw(draw.cycles(t, 0.5, 0.75)))


def _tumble(t: Floats, draw: Draw) -> Change:
    cycles = draw.cycles(t, 0.6, 0.8)
    fall = (2.0 * (cycles % 1.0) - 1.0) ** 2 - 1.0 / 3.0
    return Change(y=draw.reach(20.0, 26.0) * fall, turn=2.0 * pi * draw.sign * cycles)


def _approach(t: Floats, draw: Draw) -> Change:
    wave = _wave(draw.cycles(t, 0.6, 0.85))
    return Change(x=draw.sign * draw.reach(9.0, 13.0) * wave, size=wave)


MOTIONS: dict[str, Callable[[Floats, Draw], Change]] = {
    "approach": _approach,
    "dart": _dart,
    "eight": _eight,
    "lift": _lift,
    "pendulum": _pendulum,
    "rock": _rock,
    "shrink": _shrink,
    "spiral": _spiral,
    "square": _square,
    "swell": _swell,
    "tick": _tick,
    "tremble": _tremble,
    "tumble": _tumble,
}
"""Name of a motion, sorted -> function of times (T,) and random numbers."""
