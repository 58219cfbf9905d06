"""Coordination of processes that share an output folder: a lock, and a note for each active run.

A note is a file that its process keeps locked. The kernel releases the lock however the process
ends: an unlocked note belongs to a run whose process died without ending it. Object stores have no
locks, and so no notes.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import psutil

FOLDER = ".under-way"  # folder of the notes and the lock, in the output folder
_PATIENCE = 10.0  # seconds of waiting for a lock before a message is printed

_mutex = threading.RLock()
_alone_in: set[Path] = set()
_notes: dict[str, tuple[Path, BinaryIO]] = {}  # notes of this process's runs, by run id


def this_process() -> str:
    """Identify this process by host, process id and start time."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.2f}"


def is_alive(process: str) -> bool | None:
    """Tell whether a process from `this_process` is alive; None if it is on another machine."""
    host, _, rest = process.partition(" ")
    if host != socket.gethostname():
        return None
    number, _, created = rest.partition(" ")
    try:
        return f"{psutil.Process(int(number)).create_time():.2f}" == created
    except (psutil.NoSuchProcess, ValueError):
        return False


@contextmanager
def alone(folder: str | Path) -> Iterator[None]:
    """Run the block exclusively: no other process or thread is in such a block for the folder.

    Blocks may nest. In an object store, which has no locks, nothing is exclusive.
    """
    if "://" in str(folder):
        yield
        return
    place = Path(folder).absolute() / FOLDER
    with _mutex:
        if place in _alone_in:
            yield
            return
        if not place.exists():
            place.mkdir(parents=True, exist_ok=True)
            place.chmod(place.parent.stat().st_mode)  # the same users may write here
        with _lock_file(place) as file:  # closing it unlocks it
            began, said = time.monotonic(), False
            while _lock(file) is False:
                if not said and time.monotonic() - began > _PATIENCE:
                    said = True
                    print(f"waiting for the process that opens {folder}", file=sys.stderr)
                time.sleep(0.05)
            _alone_in.add(place)
            try:
                yield
            finally:
                _alone_in.remove(place)


def _lock_file(place: Path) -> BinaryIO:
    try:
        return (place / "lock").open("ab+")
    except PermissionError:  # another user's file, which others may only read
        return (place / "lock").open("rb")


def _lock(file: BinaryIO) -> bool | None:
    """Lock an open file; return False if another process holds the lock, None without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def described(process: str) -> str:
    """Describe a process from `this_process` in words."""
    host, _, rest = process.partition(" ")
    number, _, created = rest.partition(" ")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(created)))
    return f"process {number} on {host}, since {since}"


def begin(folder: str | Path, run_id: str, *, work: str = "") -> None:
    """Write a note of a run that this process works on, and keep it locked.

    Args:
        folder: output folder of the run.
        run_id: the run's id.
        work: fingerprint of the run's configuration, for `worker_on`.
    """
    if "://" in str(folder) or run_id in _notes:
        return
    path = _note(folder, run_id)
    with alone(folder):
        try:
            file = path.open("ab+")
        except PermissionError:  # the folder belongs to another user: go on without a note
            return
        _lock(file)
        _write(file, {"process": this_process(), "work": work})
        _notes[run_id] = path, file


def leave(run_id: str, **ending: Any) -> bool:
    """Write a run's ending into its note, when MLflow could not record it.

    Returns:
        Whether the run has a note.
    """
    if run_id not in _notes:
        return False
    _, file = _notes.pop(run_id)
    _write(file, ending)
    file.close()
    return True


def end(run_id: str) -> None:
    """Remove the note of a run of this process that has ended."""
    if run_id in _notes:
        path, file = _notes.pop(run_id)
        path.unlink(missing_ok=True)
        file.close()


def forget(folder: str | Path, run_id: str) -> None:
    """Remove the note of a run that has ended, whichever process wrote it."""
    end(run_id)
    if "://" not in str(folder):
        _note(folder, run_id).unlink(missing_ok=True)


def is_under_way(folder: str | Path, run_id: str) -> bool:
    """Tell whether another process works on a run, according to the run's note."""
    path = _note(folder, run_id)
    return run_id not in _notes and path.exists() and _is_held(path)


def worker_on(folder: str | Path, work: str) -> tuple[str, str] | None:
    """Find another process with the same `work`; return its run's id, and the process."""
    for path in _note(folder, "").parent.glob("*.json"):
        content = _read(path)
        if content.get("work") == work and path.stem not in _notes and _is_held(path):
            return path.stem, str(content.get("process"))
    return None


def left_behind(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Read the notes of runs in a folder whose process is gone, by run id."""
    return {
        path.stem: _read(path)
        for path in sorted(_note(folder, "").parent.glob("*.json"))
        if path.stem not in _notes and not _is_held(path)
    }


def _note(folder: str | Path, run_id: str) -> Path:
    return Path(folder).absolute() / FOLDER / f"{run_id}.json"


def _is_held(path: Path) -> bool:
    try:
        with path.open("rb+") as file:
            locked = _lock(file)
    except FileNotFoundError:  # the run ended in this moment
        return False
    except OSError:  # another user's file
        locked = None
    if locked is not None:
        return not locked
    return is_alive(str(_read(path).get("process", ""))) is not False


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):  # the process was killed while it wrote
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: BinaryIO, content: Mapping[str, Any]) -> None:
    file.truncate(0)
    file.write(json.dumps(dict(content)).encode())
    file.flush()
