"""Folder of Parquet files that is filled file by file, and gone on with after a kill.

The ids of the videos alone decide which file a video belongs into. A file gets its name only once
it is whole, and its footer lists its contents: the description beside the files can always be made
anew from them.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from pipelines.core.storage import (
    PARTIAL,
    file_sizes,
    join,
    open_source,
    read_bytes,
    remove,
    replacing,
)
from re2tal.errors import UserError, shortened

FOOTER_KEY = "re2tal"  # key in a footer's metadata of the file's `Contents` as JSON
NOTES = "being_decoded"  # folder of notes on videos that are decoded, but not into a file
_ENDING = ".attempts"
_MOST_ATTEMPTS = 2
_READERS = 16  # threads: reading footers is mostly waiting
_DESCRIPTION_SECONDS = 30.0  # between two writings: it may have megabytes

Entry = TypeVar("Entry")
Description = TypeVar("Description")


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents(Generic[Entry]):
    """Contents of a Parquet file, as its footer lists them.

    Attributes:
        settings: settings that decide what is made of a video.
        videos: video id to its place in the file and its facts.
        failures: video id to the reason why there is nothing of it.
    """

    settings: dict[str, Any]
    videos: dict[str, Entry]
    failures: dict[str, str]


def part(number: int) -> str:
    """Return the name of a Parquet file by its number, counted from 0."""
    return f"part-{number:05d}.parquet"


class FileWriter(Generic[Entry]):
    """Parquet file that is being written, one row group a row.

    Attributes:
        contents: content of the footer; the caller fills in `videos` and `failures`.
        rows: number of rows that are written.
    """

    def __init__(self, parquet: pq.ParquetWriter, settings: dict[str, Any]) -> None:
        self._parquet = parquet
        self.contents: Contents[Entry] = Contents(settings=settings, videos={}, failures={})
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        """Write a table of one row."""
        self._parquet.write_table(table)
        self.rows += 1


@dataclass(frozen=True, kw_only=True)
class Store(Generic[Entry, Description]):
    """Kind of folder: the names of its files and its description, and the ways to read them.

    Attributes:
        format: form of files and description, with its version.
        folder: name of the folder of the Parquet files, and word for their content.
        name: name of the file with the description.
        script: name of the script that fills such folders.
        contents: reader of footers.
        description: reader and writer of the description.
        advice: what to do about a damaged description.
    """

    format: str
    folder: str
    name: str
    script: str
    contents: TypeAdapter[Contents[Entry]]
    description: TypeAdapter[Description]
    advice: str

    def place(self, folder: str) -> str:
        """Return the folder of the Parquet files."""
        return join(folder, self.folder)

    def read_description(self, folder: str, *, mark: bytes = b"") -> Description | None:
        """Read the description of a folder; None if there is none.

        Args:
            folder: path or URI.
            mark: bytes near the beginning of each, if other programs' files bear the same name.

        Raises:
            UserError: if it is damaged, or of another form.
        """
        if self.name not in file_sizes(folder):
            return None
        uri = join(folder, self.name)
        content = read_bytes(uri)
        # an empty file, or the zeros of a machine that lost its power, is no other program's
        if mark not in content[:200] and content[:200].strip(b"\0 \r\n\t"):
            return None
        try:
            return self.description.validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(
                f"{uri} is not of the form {self.format!r}, or is damaged: {error.error_count()} "
                f"problems, the first in {where}: {first['msg']}. {self.advice}"
            ) from error

    def write_description(self, folder: str, description: Description) -> None:
        """Write the description of a folder, in the place of an older one."""
        with replacing(join(folder, self.name)) as stream:
            stream.write(self.description.dump_json(description, indent=1))

    @contextmanager
    def writing(
        self,
        uri: str,
        schema: pa.Schema,
        settings: dict[str, Any],
        *,
        dictionaries: list[str] | bool = False,
    ) -> Iterator[FileWriter[Entry]]:
        """Write a file, which gets its name and its footer when the block ends.

        `settings` decide what is made of a video; `dictionaries` are columns whose values repeat.
        """
        with (
            replacing(uri) as stream,
            # videos are compressed already, and features shrink by a tenth only; nobody needs the
            # minima and maxima of their bytes
            pq.ParquetWriter(
                stream,
                schema,
                compression="none",
                use_dictionary=dictionaries,
                write_statistics=False,
            ) as parquet,
        ):
            writer: FileWriter[Entry] = FileWriter(parquet, settings)
            yield writer
            footer = self.contents.dump_json(writer.contents).decode()
            parquet.add_key_value_metadata({FOOTER_KEY: footer})

    def open(self, uri: str) -> tuple[pq.ParquetFile, Contents[Entry]]:
        """Open a file and read its footer.

        Raises:
            UserError: if it is no such file, or is damaged.
            OSError: if it cannot be reached.
        """
        try:
            parquet = pq.ParquetFile(open_source(uri))
            metadata = parquet.metadata.metadata or {}
            return parquet, self.contents.validate_json(metadata[FOOTER_KEY.encode()])
        except (pa.ArrowInvalid, KeyError, ValueError) as error:
            raise self.unreadable(uri, error) from error

    def unreadable(self, uri: str, error: Exception) -> UserError:
        """Return the error of a file that is damaged."""
        return UserError(
            f"{uri} is no file of the form {self.format!r}, or is damaged ({error}). Remove it, "
            f"and run {self.script} again."
        )

    def read(self, folder: str, settings: Mapping[str, Any]) -> dict[str, Contents[Entry]]:
        """Read the contents of a folder's files from their footers; `settings` are theirs.

        Returns:
            File name to its contents, in the order of the names.

        Raises:
            UserError: if one is damaged, or was made with other settings.
        """
        place = self.place(folder)
        names = [name for name in file_sizes(place) if name.endswith(".parquet")]
        with ThreadPoolExecutor(max_workers=_READERS) as pool:
            held = pool.map(lambda name: self.open(join(place, name))[1], names)
            found = dict(zip(names, held, strict=True))
        for contents in found.values():
            self.require_equal(folder, settings, contents.settings)
        return found

    def require_equal(
        self, folder: str, wanted: Mapping[str, Any], there: Mapping[str, Any]
    ) -> None:
        """Refuse to go on with files that were made with other settings.

        Raises:
            UserError: with the settings that differ.
        """
        names = [name for name in {**wanted, **there} if wanted.get(name) != there.get(name)]
        if names:
            listed = "; ".join(
                f"{name}: {there.get(name)} there, {wanted.get(name)} asked for" for name in names
            )
            raise UserError(
                f"{folder} holds {self.folder} of other settings ({listed}). Give the same "
                "settings to go on with them, or another --output."
            )

    def incomplete(self, folder: str, reason: str = "") -> UserError:
        """Return the error of a folder that is used before it is whole."""
        return UserError(
            f"{folder} is not complete{reason}. Give the command with {self.script} that made it "
            "again: it goes on."
        )

    def remove_leftovers(self, folder: str) -> None:
        """Remove what a killed run left behind."""
        for place in (folder, self.place(folder), join(folder, NOTES)):
            for name in file_sizes(place):
                if PARTIAL in name or name.endswith(_ENDING):
                    remove(join(place, name))

    def check_failures(
        self, failures: Mapping[str, str], total: int, max_failed: float, *, problem: str
    ) -> None:
        """End a run of which too many videos failed; `problem` names their fault in the message.

        Raises:
            UserError: if more than the share `max_failed` of them failed.
        """
        failed = len(failures)
        if failed <= max_failed * total:
            return
        reasons = [f"{video_id}: {reason}" for video_id, reason in sorted(failures.items())]
        listed = "\n".join(f"  {line}" for line in shortened(reasons, rest=f", in {self.name}"))
        raise UserError(
            f"{failed} of {total} videos {problem}, more than the allowed {max_failed:.0%} "
            "(--max-failed). Mend them and give the same command with --retry-failed.\n"
            f"{listed}"
        )


class Refreshed:
    """Description that is written again while a run goes on, though not after each video."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write, self._written = write, time.perf_counter()

    def refresh(self, *, now: bool = False) -> None:
        """Write it if it is old; `now` writes it however new it is."""
        if now or time.perf_counter() - self._written > _DESCRIPTION_SECONDS:
            self._write()
            self._written = time.perf_counter()


class Attempts:
    """Note of the video that is being decoded, for the process that comes after a crash.

    Ray starts a task again whose process died. Without a note it would die of the same video again,
    for ever. The note lies beside the file that is being made, `uri`.
    """

    def __init__(self, uri: str) -> None:
        folder, _, name = uri.rpartition("/")
        self._uri = uri + _ENDING
        self._noted = name + _ENDING in file_sizes(folder)
        self._counts: dict[str, int] = json.loads(read_bytes(self._uri)) if self._noted else {}

    def begin(self, video_id: str) -> str:
        """Note that a video is begun; return the reason why it must not be, empty if it may be."""
        self._counts[video_id] = self._counts.get(video_id, 0) + 1
        with replacing(self._uri) as stream:
            stream.write(json.dumps(self._counts).encode())
        self._noted = True
        if self._counts[video_id] <= _MOST_ATTEMPTS:
            return ""
        times = f"{_MOST_ATTEMPTS} times"
        return f"ended the process that read it, {times}: a crash, or too little memory"

    def end(self, video_id: str) -> None:
        """Forget a video that is through."""
        del self._counts[video_id]

    def clear(self) -> None:
        """Remove the note: the file is whole."""
        if self._noted:
            remove(self._uri)
