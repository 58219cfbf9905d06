"""Files by path or URI: annotations, weights and videos, local or in an object store."""

import errno
import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote
from uuid import uuid4

import pyarrow.fs as pafs

from re2tal.errors import UserError

_Found = TypeVar("_Found")

_HEAD = 1 << 16  # bytes at the beginning of a file that distinguish it from others
_READERS = 16  # threads: reading beginnings is mostly waiting for storage

PARTIAL = ".partial-"  # in the names of files that are not whole
_BLOCK = 2**20
_SPARE = 32 * 2**20  # bytes that stay free beside a checkpoint: MLflow's database lies there too
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOCKED = (errno.EROFS, errno.EACCES, errno.EPERM)
_AGAIN = "and give the same command again: it goes on."


BACKBONE_FILE = "backbone.safetensors"
"""Weights of a backbone, in a model or among the artifacts of a run."""

# Prefixes of MLflow's URIs: an artifact of a run, a model, an artifact on a tracking server.
MLFLOW = ("runs:/", "models:/", "mlflow-artifacts:/")


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a path or URI, and the path in it."""
    if "://" in uri:
        remote: tuple[pafs.FileSystem, str] = pafs.FileSystem.from_uri(uri)
        return remote
    return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())


def require(uri: str | None, *, what: str, option: str) -> str:
    """Check that something exists at a path or URI.

    Args:
        uri: the path or URI, None if none was given. URIs of MLflow are not checked here, but by
            `local_copy`.
        what: name of the input in the message ("The annotations").
        option: command-line option that sets it.

    Returns:
        The same URI, or the absolute path.

    Raises:
        UserError: `uri` was not given, does not exist, cannot be reached or is no regular file.
    """
    if uri is None:
        raise UserError(f"{what}: no path given. Say where with {option} PATH_OR_URI.")
    if uri.startswith(MLFLOW):
        return uri
    try:
        filesystem, path = resolve(uri)
        kind = filesystem.get_file_info(path).type
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {uri} cannot be reached ({error}). Correct {option}.") from error
    if kind == pafs.FileType.NotFound:
        raise UserError(f"{what}: nothing at {uri}. Correct {option}.")
    if kind == pafs.FileType.Unknown:  # reading might never end
        raise UserError(
            f"{what}: {uri} is no regular file, but a pipe, a socket or a device. Correct {option}."
        )
    return uri if "://" in uri else path


def open_source(uri: str) -> str | BinaryIO:
    """Return a source for PyAV: a local path unchanged, a remote object as a seekable file."""
    if "://" not in uri:
        return uri
    filesystem, path = resolve(uri)
    file: BinaryIO = filesystem.open_input_file(path)
    return file


def absolute(uri: str) -> str:
    """Make a path absolute, for processes in other folders; a URI stays unchanged."""
    remote = "://" in uri or uri.startswith(MLFLOW)
    return uri if remote else str(Path(uri).expanduser().absolute())


def join(folder: str, name: str) -> str:
    """Return the path or URI of a file or folder in a folder; its name may contain slashes."""
    return f"{folder.rstrip('/')}/{name}"


def _files(
    uri: str, *, recursive: bool = False, missing: bool = False
) -> dict[str, tuple[str, int]]:
    """Return path or URI and size of the files in a folder, sorted by name.

    Names are paths inside the folder, with slashes. With `missing`, a folder that does not exist
    counts as empty; otherwise it is an error.
    """
    filesystem, path = resolve(uri)
    selector = pafs.FileSelector(path, allow_not_found=missing, recursive=recursive)
    folder = uri.rstrip("/") if "://" in uri else path
    sizes = {
        str(Path(info.path).relative_to(path)): info.size
        for info in filesystem.get_file_info(selector)
        if info.type == pafs.FileType.File
    }
    return {name: (f"{folder}/{name}", size) for name, size in sorted(sizes.items())}


def database_url(file: str | Path) -> str:
    """Return the URL of a SQLite file for MLflow and Optuna, which create the file if missing.

    `%` and `?` are quoted: SQLAlchemy decodes `%` with two digits, and treats all after a `?` as
    options.
    """
    name = str(file)
    quoted = name.replace("%", "%25").replace("?", "%3F")
    # with the driver's name: otherwise MLflow would make an empty folder with the quoted name
    return f"{'sqlite' if quoted == name else 'sqlite+pysqlite'}:///{quoted}"


def database_file(url: str) -> Path | None:
    """Return the SQLite file of a database URL; None for other kinds of stores."""
    kind, found, rest = url.partition(":///")
    if not found or kind.partition("+")[0] != "sqlite":
        return None
    return Path(unquote(rest.partition("?")[0]))


def list_files(uri: str) -> dict[str, str]:
    """Map the names of the files directly in a folder to their paths or URIs."""
    return {name: place for name, (place, _) in _files(uri).items()}


def walk_files(uri: str) -> dict[str, str]:
    """Map the files in a folder and its subfolders, by path inside it, to their paths or URIs."""
    return {name: place for name, (place, _) in _files(uri, recursive=True).items()}


def file_sizes(uri: str) -> dict[str, int]:
    """Map the names of the files directly in a folder, which may be missing, to their bytes."""
    return {name: size for name, (_, size) in _files(uri, missing=True).items()}


def sizes_below(uri: str) -> dict[str, int]:
    """Map the files in a folder, which may be missing, and its subfolders to their bytes."""
    files = _files(uri, recursive=True, missing=True)
    return {name: size for name, (_, size) in files.items()}


def folders_in(uri: str) -> list[str]:
    """Return the sorted names of the folders in a folder, which may be missing."""
    filesystem, path = resolve(uri)
    found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)


def file_size(uri: str) -> int:
    """Return the number of bytes of a file."""
    filesystem, path = resolve(uri)
    return int(filesystem.get_file_info(path).size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """Signs by which a file is recognised, to detect that another one replaced it.

    Attributes:
        bytes: size of the file.
        head: digest of its first bytes; empty if it is not known.
        modified: time of its last modification in nanoseconds since 1970; None if the time is not
            compared, as for shards, whose bytes must not depend on it.
    """

    bytes: int
    head: str
    modified: int | None = None

    @property
    def undated(self) -> "Stamp":
        """Stamp without the time."""
        return replace(self, modified=None)


def stamps_of(uris: Mapping[str, str]) -> dict[str, Stamp]:
    """Read the stamps of files; `uris` maps names to paths or URIs.

    Returns:
        Name to stamp; unreadable files are left out.
    """

    def read(uri: str) -> Stamp | None:
        filesystem, path = resolve(uri)
        try:
            info = filesystem.get_file_info(path)
            with filesystem.open_input_file(path) as file:
                head = hashlib.blake2b(file.read(_HEAD), digest_size=16).hexdigest()
        except OSError:
            return None
        return Stamp(bytes=info.size, head=head, modified=info.mtime_ns)

    found = _of_each(uris, read)
    return {name: stamp for name, stamp in found.items() if stamp is not None}


def replaced_files(uris: Mapping[str, str], stamps: Mapping[str, Stamp]) -> list[str]:
    """Find the files that no longer match their stamps; both mappings are by name.

    A file with the same size and modification time counts as unchanged. If only the time differs,
    as after copying, the beginning is compared. A missing file was not replaced.
    """

    def look(uri: str) -> Any:
        filesystem, path = resolve(uri)
        return filesystem.get_file_info(path)

    known = {name: stamp for name, stamp in stamps.items() if name in uris}
    found = _of_each({name: uris[name] for name in known}, look)
    there = {name: info for name, info in found.items() if info.type == pafs.FileType.File}
    others = {name for name, info in there.items() if info.size != known[name].bytes}
    unsure = {
        name: uris[name]
        for name, info in there.items()
        if name not in others
        and known[name].head
        and (known[name].modified is None or known[name].modified != info.mtime_ns)
    }
    now = stamps_of(unsure)
    return sorted(others.union(n for n, stamp in now.items() if stamp.head != known[n].head))


def _of_each(uris: Mapping[str, str], function: Callable[[str], _Found]) -> dict[str, _Found]:
    """Apply a function to paths or URIs in threads, and return its results by name."""
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        return dict(zip(uris, pool.map(function, uris.values()), strict=True))


def read_bytes(uri: str) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: the file cannot be read, or is no regular file.
    """
    filesystem, path = resolve(uri)
    if "://" not in uri and filesystem.get_file_info(path).type == pafs.FileType.Unknown:
        raise OSError(f"{path} is no regular file, but a pipe, a socket or a device.")
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def crc32(uri: str) -> str:
    """Compute the CRC-32 of a file's content, as eight hexadecimal digits."""
    filesystem, path = resolve(uri)
    value = 0
    with filesystem.open_input_stream(path) as stream:
        while block := stream.read(_BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


@contextmanager
def replacing(uri: str) -> Iterator[Any]:
    """Open a file for writing that gets its name only once it is whole.

    Until then it has a unique temporary name in the same folder, which contains `PARTIAL`. If
    writing fails, an existing file stays untouched. A missing folder is created.

    Args:
        uri: path or URI of the file.
    """
    filesystem, path = resolve(uri)
    filesystem.create_dir(str(Path(path).parent), recursive=True)
    partial = f"{path}{PARTIAL}{uuid4().hex}"
    try:
        with filesystem.open_output_stream(partial) as stream:
            yield stream
        filesystem.move(partial, path)
    except BaseException:
        if filesystem.get_file_info(partial).type == pafs.FileType.File:
            filesystem.delete_file(partial)
        raise


def remove(uri: str) -> None:
    """Delete a file."""
    filesystem, path = resolve(uri)
    filesystem.delete_file(path)


def remove_folder(uri: str) -> None:
    """Delete a folder with its content."""
    filesystem, path = resolve(uri)
    filesystem.delete_dir(path)


def require_room(folder: str, wanted: int, *, what: str) -> None:
    """Check that a folder is writable and has room for a new file or folder.

    Object stores are not checked.

    Args:
        folder: path or URI; if it is missing, its nearest existing parent is checked.
        wanted: bytes of the new file or folder.
        what: its name in the message ("a checkpoint").

    Raises:
        UserError: the disk is too full, or the folder cannot be written to.
    """
    if "://" in folder:
        return
    place = next(
        p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists()
    )
    with writing_to(folder, what=what), tempfile.TemporaryFile(dir=place):
        there = shutil.disk_usage(place).free
    if there < wanted + _SPARE:
        raise UserError(
            f"There is no room for {what}: {_size(wanted + _SPARE)} are needed in {folder}, "
            f"{_size(there)} are free. Make room, {_AGAIN}"
        )


@contextmanager
def writing_to(folder: str, *, what: str) -> Iterator[None]:
    """Turn the error of a full or read-only disk into one sentence.

    Args:
        folder: folder that the block writes to.
        what: name of the written file or folder in the message ("a checkpoint").

    Raises:
        UserError: the disk is full, or the folder is not writable.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            there = _size(shutil.disk_usage(folder).free)
            raise UserError(
                f"There was no room for {what} in {folder}: {there} are free. Make room, {_AGAIN}"
            ) from error
        if error.errno in _LOCKED:
            raise UserError(
                f"{what.capitalize()} cannot be written to {folder}: "
                f"{os.strerror(error.errno)}. Make the folder writable, {_AGAIN}"
            ) from error
        raise


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def is_folder(uri: str) -> bool:
    """Tell whether there is a folder at a path or URI."""
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type == pafs.FileType.Directory)


def local_copy(uri: str, folder: Path, *, tracking_uri: str | None = None) -> Path:
    """Return a local path to a file; a remote file is copied into `folder` first.

    Args:
        uri: path or URI of a file, or a URI of MLflow: `runs:/<run>/<path>` of an artifact, or
            `models:/<name>/<version>` or `models:/<id>` of a model with a `backbone.safetensors`.
        folder: existing folder that receives a copy.
        tracking_uri: MLflow's store; None for the one that is set in this process.

    Raises:
        UserError: MLflow has no such file.
    """
    if uri.startswith(MLFLOW):
        return _from_mlflow(uri, folder, tracking_uri)
    filesystem, path = resolve(uri)
    if "://" not in uri:
        return Path(path)
    target = folder / Path(path).name
    pafs.copy_files(path, str(target), source_filesystem=filesystem)
    return target


def _from_mlflow(uri: str, folder: Path, tracking_uri: str | None) -> Path:
    found = fetch(uri, folder, tracking_uri=tracking_uri, what="The weights")
    if found.is_file():
        return found
    inside = next(found.rglob(BACKBONE_FILE), None)
    if inside is None:
        raise UserError(
            f"There is no {BACKBONE_FILE} in {uri}: name the model of a run of "
            "finetune_backbone.py, or one file."
        )
    return inside


def fetch(uri: str, folder: Path, *, tracking_uri: str | None, what: str) -> Path:
    """Download an artifact from MLflow.

    Args:
        uri: `runs:/RUN/NAME`, `models:/NAME/VERSION` or `mlflow-artifacts:/...`.
        folder: existing folder that receives it.
        tracking_uri: MLflow's store; None for the one that is set in this process.
        what: name of the artifact in the message ("The model").

    Raises:
        UserError: MLflow has no such artifact.
    """
    # imported here: decoding processes import this module and should start fast
    import mlflow
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if tracking_uri is not None:
        # for the whole process: MLflow would not use an argument for `models:/`
        mlflow.set_tracking_uri(tracking_uri)
    try:
        return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        store = mlflow.get_tracking_uri()
        raise UserError(
            f"{what}: {uri} cannot be downloaded from MLflow's store {store} ({error}). Correct "
            "the URI or the store."
        ) from error
