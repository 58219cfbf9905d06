"""Memory sizes, and the longest video that fits into one."""

import re
from collections.abc import Callable, Mapping

GIBIBYTE = 2**30

_UNITS = {"GiB": 2**30, "MiB": 2**20, "TiB": 2**40, "GB": 10**9, "MB": 10**6, "TB": 10**12}


def parse_size(text: str) -> int:
    """Read a size such as "24GiB" or "80 GB" as bytes.

    Raises:
        ValueError: if the text is not a number and a unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {name.lower(): size for name, size in _UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ValueError(
            f"{text!r} is not a memory size: give a number and one of {', '.join(_UNITS)}, "
            "for example 24GiB."
        )
    return int(float(found[1]) * units[found[2].lower()])


def largest_that_fits(
    peak: Callable[[int], int], budget: int, *, start: int, found: Mapping[int, int] | None = None
) -> int:
    """Find the largest number of units whose peak is within a budget; 0 if one unit is too much.

    The peak is almost linear in the length of a video, so the next guess is where the line through
    the two nearest peaks meets the budget (secant method). This takes a handful of predictions.

    Args:
        peak: function from a number of units, at least 1, to bytes; it increases.
        budget: bytes.
        start: first guess, at least 1.
        found: known peaks, by number of units.
    """
    known = dict(found or {})
    if start not in known:
        known[start] = peak(start)
    guesses = 0
    while True:
        fits = [n for n, size in known.items() if size <= budget]
        bursts = [n for n, size in known.items() if size > budget]
        low, high = max(fits, default=0), min(bursts, default=None)
        if high == low + 1:
            return low
        # After 6 guesses without success, bisection is certain to end.
        if high is not None and guesses > 6:
            guess = (low + high) // 2
        else:
            guess = _guess(known, budget, low, high)
        known[guess] = peak(guess)
        guesses += 1


def _guess(known: dict[int, int], budget: int, low: int, high: int | None) -> int:
    """Choose an untried number above `low` and below `high`."""
    if len(known) == 1:
        (only,) = known
        return max(1, only // 2) if high is not None else only * 2
    near = sorted(known, key=lambda n: abs(known[n] - budget))[:2]
    (a, b), (size_a, size_b) = near, (known[near[0]], known[near[1]])
    slope = (size_b - size_a) / (b - a)
    guess = int(a + (budget - size_a) / slope) if slope > 0 else 2 * max(near)
    if high is None:
        return max(low + 1, min(guess, 64 * max(known)))  # a nearly flat line must not run away
    if guess <= low:
        return low + 1
    return min(guess, high - 1)
