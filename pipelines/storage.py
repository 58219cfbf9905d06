"""Files by path or by URI: annotations, weights and videos, local or in an object store."""

from pathlib import Path
from typing import BinaryIO

import pyarrow.fs as pafs


class StorageError(Exception):
    """A path or URI that cannot be used: what it is for, where it points, what to do."""


def _resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" in uri:
        return pafs.FileSystem.from_uri(uri)
    return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())


def require(uri: str | None, *, what: str, option: str) -> str:
    """Checks that something exists at a path or URI.

    Args:
        uri: the path or URI, None if none was given.
        what: what should be there, for the message ("the annotations").
        option: the command-line option that sets it.

    Returns:
        The same URI, or the absolute path.

    Raises:
        StorageError: with one sentence if it was not given, is not there or cannot be reached.
    """
    if uri is None:
        raise StorageError(f"{what}: no path given. Say where with {option} PATH_OR_URI.")
    try:
        filesystem, path = _resolve(uri)
        found = filesystem.get_file_info(path).type != pafs.FileType.NotFound
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{what}: {uri} cannot be reached ({error}). Correct {option}."
        ) from error
    if not found:
        raise StorageError(f"{what}: nothing at {uri}. Correct {option}.")
    return uri if "://" in uri else path


def open_source(uri: str) -> str | BinaryIO:
    """Returns what PyAV can open: a local path as it is, a remote object as a seekable file.

    Args:
        uri: path or URI of a file.
    """
    if "://" not in uri:
        return uri
    filesystem, path = _resolve(uri)
    return filesystem.open_input_file(path)


def list_files(uri: str) -> dict[str, str]:
    """Lists the files directly in a folder.

    Args:
        uri: path or URI of the folder.

    Returns:
        File name to its path or URI, in the order of the names.
    """
    filesystem, path = _resolve(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(path))
    names = sorted(info.base_name for info in infos if info.type == pafs.FileType.File)
    folder = uri.rstrip("/") if "://" in uri else path
    return {name: f"{folder}/{name}" for name in names}


def local_copy(uri: str, folder: Path) -> Path:
    """Returns a local path to a file, copied into `folder` first when it is remote.

    Args:
        uri: path or URI of a file.
        folder: where a copy may go; it exists.
    """
    filesystem, path = _resolve(uri)
    if "://" not in uri:
        return Path(path)
    target = folder / Path(path).name
    pafs.copy_files(path, str(target), source_filesystem=filesystem)
    return target
