"""A folder of Parquet files that is filled file by file, and gone on with after a kill.

The ids of the videos alone decide which file a video belongs into. A file has its name only once it
is whole, and its footer says what it holds: the description beside the files can always be made
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

FOOTER_KEY = "re2tal"  # of the metadata in a footer that hold the file's `Contents` as JSON
NOTES = "being_decoded"  # folder for notes on videos of which no file is being written
_ENDING = ".attempts"
_MOST_ATTEMPTS = 2
_READERS = 16  # footers are waited for more than they are read
_DESCRIPTION_SECONDS = 30.0  # from one writing of it to the next: it may have megabytes

Entry = TypeVar("Entry")
Description = TypeVar("Description")


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents(Generic[Entry]):
    """What a Parquet file holds, as its footer says.

    Attributes:
        settings: what decides what is made of a video.
        videos: video id to where it lies in the file, and what it is.
        failures: video id to why there is nothing of it.
    """

    settings: dict[str, Any]
    videos: dict[str, Entry]
    failures: dict[str, str]


def part(number: int) -> str:
    """The name of a Parquet file.

    Args:
        number: of the file, from 0 on.
    """
    return f"part-{number:05d}.parquet"


class FileWriter(Generic[Entry]):
    """A Parquet file that is being written, one row group a row.

    Attributes:
        contents: goes into the footer; `videos` and `failures` are filled in by the caller.
        rows: that are written.
    """

    def __init__(self, parquet: pq.ParquetWriter, settings: dict[str, Any]) -> None:
        self._parquet = parquet
        self.contents: Contents[Entry] = Contents(settings=settings, videos={}, failures={})
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        """Writes a table of one row."""
        self._parquet.write_table(table)
        self.rows += 1


@dataclass(frozen=True, kw_only=True)
class Store(Generic[Entry, Description]):
    """One kind of folder: what its files and its description are called, and how they are read.

    Attributes:
        format: of files and description, with its version.
        folder: name of the folder of the Parquet files, and word for what they hold.
        name: of the file with the description.
        script: that fills such folders.
        contents: reads footers.
        description: reads and writes the description.
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
        """The folder of the Parquet files."""
        return join(folder, self.folder)

    def read_description(self, folder: str, *, mark: bytes = b"") -> Description | None:
        """Reads the description of a folder.

        Args:
            folder: path or URI.
            mark: stands near the beginning of each, if other programs' files bear the same name.

        Returns:
            None if there is none.

        Raises:
            UserError: if it is damaged, or of another form.
        """
        if self.name not in file_sizes(folder):
            return None
        uri = join(folder, self.name)
        content = read_bytes(uri)
        if mark not in content[:200]:
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
        """Writes the description of a folder, in the place of an older one."""
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
        """Writes a file, which gets its name and its footer when the block ends.

        Args:
            uri: path or URI of the file.
            schema: its columns.
            settings: what decides what is made of a video.
            dictionaries: columns whose values repeat.
        """
        with (
            replacing(uri) as stream,
            # videos are compressed already, and features compress by a tenth; nobody asks for the
            # smallest and largest of their bytes
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
        """Opens a file and reads its footer.

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
        """The error of a file that is damaged."""
        return UserError(
            f"{uri} is no file of the form {self.format!r}, or is damaged ({error}). Remove it, "
            f"and run {self.script} again."
        )

    def read(self, folder: str, settings: Mapping[str, Any]) -> dict[str, Contents[Entry]]:
        """Reads what the files of a folder hold, from their footers.

        Args:
            folder: path or URI.
            settings: with which all of them must have been made.

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
        """Refuses to go on with what was made with other settings.

        Raises:
            UserError: it says what differs.
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
        """The error of a folder that is used before it is whole."""
        return UserError(
            f"{folder} is not complete{reason}. Give the command with {self.script} that made it "
            "again: it goes on."
        )

    def remove_leftovers(self, folder: str) -> None:
        """Removes what a killed run left behind."""
        for place in (folder, self.place(folder), join(folder, NOTES)):
            for name in file_sizes(place):
                if PARTIAL in name or name.endswith(_ENDING):
                    remove(join(place, name))

    def check_failures(
        self, failures: Mapping[str, str], total: int, max_failed: float, *, problem: str
    ) -> None:
        """Ends a run of which too many videos failed.

        Args:
            failures: video id to reason.
            total: number of videos in all.
            max_failed: the largest share that may fail, 0 to 1.
            problem: of these videos, for the message.

        Raises:
            UserError: if more failed.
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
    """Writes a description again while a run goes on, though not after each video."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write, self._written = write, time.perf_counter()

    def refresh(self, *, now: bool = False) -> None:
        """Writes it if it is old.

        Args:
            now: however new it is.
        """
        if now or time.perf_counter() - self._written > _DESCRIPTION_SECONDS:
            self._write()
            self._written = time.perf_counter()


class Attempts:
    """Notes which video is being decoded, for the process that comes after a crash.

    Ray starts a task again whose process died. Without a note it would die of the same video again,
    for ever.

    Args:
        uri: path or URI of the file that is being made, beside which the note lies.
    """

    def __init__(self, uri: str) -> None:
        folder, _, name = uri.rpartition("/")
        self._uri = uri + _ENDING
        self._noted = name + _ENDING in file_sizes(folder)
        self._counts: dict[str, int] = json.loads(read_bytes(self._uri)) if self._noted else {}

    def begin(self, video_id: str) -> str:
        """Notes that a video is begun; returns why it must not be, empty if it may be."""
        self._counts[video_id] = self._counts.get(video_id, 0) + 1
        with replacing(self._uri) as stream:
            stream.write(json.dumps(self._counts).encode())
        self._noted = True
        if self._counts[video_id] <= _MOST_ATTEMPTS:
            return ""
        times = f"{_MOST_ATTEMPTS} times"
        return f"ended the process that read it, {times}: a crash, or too little memory"

    def end(self, video_id: str) -> None:
        """Forgets a video that is through."""
        del self._counts[video_id]

    def clear(self) -> None:
        """Removes the note: the file is whole."""
        if self._noted:
            remove(self._uri)
