"""Findings of the checks; exceptions and checks that hang become findings too.

Only the standard library is imported: this module also runs where packages are missing.
"""

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

T = TypeVar("T")

_SHOWN = 200  # characters at each end; some exceptions quote whole pages
_SECRET = re.compile(r"(://[^/\s:@]*):[^/\s]+@")


@dataclass(frozen=True, slots=True)
class Finding:
    """Line of the report.

    Attributes:
        verdict: "ok", "note" for something that hinders no run, or "FAIL".
        text: sentences; those of a failure say what is wrong, where, and what to do.
    """

    verdict: Literal["ok", "note", "FAIL"]
    text: str


ok, note, fail = (partial(Finding, verdict) for verdict in ("ok", "note", "FAIL"))


def summary(findings: Sequence[Finding]) -> str:
    """Count all findings of a report in its last line."""
    verdicts = [finding.verdict for finding in findings]
    counts = f"{verdicts.count('ok')} ok, {verdicts.count('note')} to know"
    if failed := verdicts.count("FAIL"):
        return f"{failed} to mend ({counts}): see the lines that begin with FAIL."
    return f"Nothing to mend ({counts})."


def without_password(text: str) -> str:
    """Replace the passwords of URIs such as `https://user:password@host` in a text by stars."""
    return _SECRET.sub(r"\1:***@", text)


def reason(error: BaseException) -> str:
    """Describe an exception, of this process or of a Ray task, in one line without passwords."""
    # Ray writes the stack first, and the exception on the last line
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if hasattr(error, "cause") and lines else " ".join(lines)
    name = type(error).__name__
    if not text:
        text = name
    elif not isinstance(error, OSError) and not hasattr(error, "cause"):
        text = f"{name}: {text}"
    text = without_password(" ".join(text.split()))
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} ... {text[-_SHOWN:]}"


def within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function in a thread, and give it up if it takes too long.

    Raises:
        TimeoutError: if it did not end in time; it may still run in its thread.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([future], timeout=seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s (give more with --timeout)")
    return future.result()


def run_check(check: Callable[[], Iterable[Finding]], *, seconds: float) -> list[Finding]:
    """Run a check; one that raises or hangs becomes a failure."""
    try:
        return within(seconds, lambda: list(check()))
    except Exception as error:
        return [fail(f"The check itself failed: {reason(error)}.")]
