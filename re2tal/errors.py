"""The error of which programs show the message alone, and long lists in messages."""

from collections.abc import Sequence


class UserError(Exception):
    """Mistake in what the user gave; the message says what is wrong, where, and what to do.

    Scripts print the message without a stack and exit with 1. A subclass exists only where code
    catches it apart from the others.
    """


def shortened(items: Sequence[str], most: int = 20, *, rest: str = "") -> list[str]:
    """The first items of a list for a message, and how many more there are.

    Args:
        items: lines or names.
        most: number of items that are shown.
        rest: place of the others, as ", in failures.json".
    """
    left = len(items) - most
    return [*items[:most], *([f"... and {left:,} more{rest}"] if left > 0 else [])]
