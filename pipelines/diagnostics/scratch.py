"""A folder for tries in the output, of which nothing stays."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import pyarrow.fs as pafs

from pipelines.core.storage import join, resolve


@contextmanager
def scratch(output: str) -> Iterator[str]:
    """Makes a folder in the output; removes it at the end, and the output if it was not there.

    Args:
        output: absolute path or URI.

    Yields:
        Path or URI of the folder.

    Raises:
        OSError: if it cannot be made.
    """
    name = f".doctor-{uuid4().hex}"
    filesystem, path = resolve(output)
    missing = _missing(filesystem, path)
    try:
        filesystem.create_dir(f"{path}/{name}", recursive=True)
        yield join(output, name)
    except BaseException:
        with suppress(OSError):  # what went wrong first is what matters
            _remove(filesystem, path, name, missing)
        raise
    _remove(filesystem, path, name, missing)


def _remove(filesystem: pafs.FileSystem, path: str, name: str, missing: Sequence[str]) -> None:
    if _exists(filesystem, f"{path}/{name}"):
        filesystem.delete_dir(f"{path}/{name}")
    for folder in missing:
        _remove_empty(filesystem, folder)


def _missing(filesystem: pafs.FileSystem, path: str) -> list[str]:
    """The folder and those above it that do not exist, from the innermost to the outermost."""
    chain = [path, *map(str, Path(path).parents)]
    missing = []
    for folder in chain:
        if folder in ("", ".", "/") or _exists(filesystem, folder):
            break
        missing.append(folder)
    return missing


def _exists(filesystem: pafs.FileSystem, folder: str) -> bool:
    return bool(filesystem.get_file_info(folder).type != pafs.FileType.NotFound)


def _remove_empty(filesystem: pafs.FileSystem, folder: str) -> None:
    """Removes a folder, unless somebody has put something into it meanwhile."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        with suppress(OSError):
            Path(folder).rmdir()
    elif _exists(filesystem, folder) and not filesystem.get_file_info(pafs.FileSelector(folder)):
        filesystem.delete_dir(folder)
