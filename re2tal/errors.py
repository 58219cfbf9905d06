"""Error of which programs show the message alone, and shortening of long lists in messages."""

from collections.abc import Sequence


class UserError(Exception):
    """Mistake in what the user gave; the message says what is wrong, where, and what to do.

    Scripts print the message without a stack and exit with 1. A subclass exists only where code
    catches it apart from the others.
    """


def shortened(items: Sequence[str], most: int = 20, *, rest: str = "") -> list[str]:
    """Shorten a list for a message to its first items and the number of the others.

    Args:
        items: lines or names.
        most: number of items that are shown.
        rest: place where the others are listed, such as ", in failures.json".
    """
    left = len(items) - most
    return [*items[:most], *([f"... and {left:,} more{rest}"] if left > 0 else [])]
