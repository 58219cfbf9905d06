"""Durations in words, and an estimate of a run's remaining time."""

import time
from collections import deque
from collections.abc import Callable


def duration(seconds: float) -> str:
    """Format seconds, 0 or more, as minutes and seconds or hours and minutes: `3:07`, `2 h 05`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60} h {minutes % 60:02d}"


class TimeLeft:
    """Estimate of a run's remaining time, from its last steps and its last evaluation.

    The first step of the process is not counted: it waits for the first videos to be decoded.

    Args:
        now: clock in seconds.
    """

    _ENOUGH = 10  # steps; the mean of fewer is unreliable
    _RECENT = 50  # steps

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._steps: deque[float] = deque(maxlen=self._RECENT)
        self._evaluation: float | None = None
        self._last: float | None = None

    def step(self) -> None:
        """Count a step that has just ended."""
        now = self._now()
        if self._last is not None:
            self._steps.append(now - self._last)
        self._last = now

    def evaluation(self) -> None:
        """Count an evaluation that has just ended, with its checkpoint."""
        now = self._now()
        if self._last is not None:
            self._evaluation = now - self._last
        self._last = now

    def describe(self, *, steps: int, evaluations: int) -> str:
        """Return the estimate in words; empty while too few steps are known.

        Args:
            steps: number of steps to come.
            evaluations: number of evaluations to come.
        """
        if len(self._steps) < self._ENOUGH:
            return ""
        left = sum(self._steps) / len(self._steps) * steps  # seconds
        if self._evaluation is not None or not evaluations:
            return f"left {duration(left + (self._evaluation or 0.0) * evaluations)}"
        behind = "the evaluation" if evaluations == 1 else f"{evaluations} evaluations"
        return f"left {duration(left)} and {behind}"
