"""Lists in the messages of errors."""

from collections.abc import Sequence

_LISTED = 10


def listed(names: Sequence[str]) -> str:
    """The first ten names, and how many there are besides: `a, b, c and 5 more`."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
