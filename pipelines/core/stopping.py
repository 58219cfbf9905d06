"""Stop of a command by Ctrl-C or SIGTERM: announced at once, and at once when they come again."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def goes_on() -> str:
    """Say how to go on with a command that keeps each piece of work once it is done."""
    return "what is done is kept: give the same command again to go on"


@contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """End the block by `SystemExit` on the first SIGINT or SIGTERM, and the process on the second.

    Outside the main thread, which alone receives signals, nothing is changed.

    Args:
        kept: function that says, once the block has ended, what is kept and how to go on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    code = 0

    def stop(number: int, _: FrameType | None) -> NoReturn:
        nonlocal code
        code = 128 + number
        for each in _SIGNALS:
            signal.signal(each, _end)
        name = signal.Signals(number).name
        _say(f"stopping ({name}); once more ends this at once")
        raise SystemExit(code)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        if code:
            _say(kept())
            raise SystemExit(code)  # again, because Ray makes a SystemExit(1) of it
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> NoReturn:
    _say(f"ended ({signal.Signals(number).name})")
    os._exit(128 + number)


def _say(line: str) -> None:
    """Write a line past Python's buffers, which the interrupted code may be writing to."""
    os.write(2, f"{line}\n".encode())
