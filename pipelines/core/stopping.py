"""Stop of a command by Ctrl-C or SIGTERM: orderly at the first signal, at once at the second."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def goes_on() -> str:
    """Return the sentence about continuing a command that saves each finished piece of work."""
    return "what is done is kept: give the same command again to go on"


@contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """End the block by `SystemExit` on the first SIGINT or SIGTERM, and the process on the second.

    Outside the main thread, the only one that receives signals, this does nothing.

    Args:
        kept: function called once the block has ended; returns the sentence about kept work and how
            to continue.
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
            raise SystemExit(code)  # again, because Ray turns the first into SystemExit(1)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> NoReturn:
    _say(f"ended ({signal.Signals(number).name})")
    os._exit(128 + number)


def _say(line: str) -> None:
    """Write a line to the descriptor: the interrupted code may be writing to Python's buffers."""
    os.write(2, f"{line}\n".encode())
