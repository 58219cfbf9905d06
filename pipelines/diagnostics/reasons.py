"""An exception in one line, without what must not be shown."""

import re

_FIRST, _LAST = 200, 200  # characters; some exceptions quote whole pages
_SECRET = re.compile(r"(://[^/\s:@]*):[^/\s]+@")


def without_password(text: str) -> str:
    """Returns a text in which the passwords of URIs are stars.

    Args:
        text: perhaps with URIs such as `https://user:password@host`.
    """
    return _SECRET.sub(r"\1:***@", text)


def reason(error: BaseException) -> str:
    """Returns what an exception says, in one line.

    Args:
        error: of this process, or a Ray task's.
    """
    # Ray writes the stack first, and what was raised on the last line
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if hasattr(error, "cause") and lines else " ".join(lines)
    name = type(error).__name__
    if not text:
        text = name
    elif not isinstance(error, OSError) and not hasattr(error, "cause"):
        text = f"{name}: {text}"
    text = without_password(" ".join(text.split()))
    short = len(text) <= _FIRST + _LAST
    return text if short else f"{text[:_FIRST]} ... {text[-_LAST:]}"
