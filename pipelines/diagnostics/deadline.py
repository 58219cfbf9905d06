"""A check that breaks or hangs is a failure like any other, and the next one has its turn."""

import threading
from collections.abc import Callable, Sequence

from pipelines.diagnostics.finding import Finding, fail
from pipelines.diagnostics.reasons import reason


def within(
    seconds: float, check: str, function: Callable[[], Sequence[Finding]]
) -> Sequence[Finding]:
    """Runs a check.

    Args:
        seconds: after which it is given up; it may then still go on in a thread of its own.
        check: its name.
        function: what it does.

    Returns:
        What it found, or one failure.
    """
    found: list[Sequence[Finding]] = []

    def run() -> None:
        try:
            found.append(function())
        except Exception as error:
            found.append([fail(check, f"The check itself broke: {reason(error)}.")])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        return [
            fail(
                check,
                f"The check did not end within {seconds:g} s and was given up. What it waits for "
                "does not answer, or is slow: then give more time with --timeout.",
            )
        ]
    return found[0]
