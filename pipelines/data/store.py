"""Folder of Parquet files that is filled file by file; a killed run can be continued.

The ids of the videos alone determine which file a video belongs to. A file gets its name only once
it is whole, and its footer lists its contents: the description beside the files can always be
rebuilt from the footers.
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
from re2tal.json_files import problem_of

FOOTER_KEY = "re2tal"  # key of the file's `Contents`, as JSON, in the footer's metadata
NOTES = "being_decoded"  # folder of the notes (`Attempts`) of decoding that writes no file itself
_ENDING = ".attempts"
_MOST_ATTEMPTS = 2
_READERS = 16  # threads: reading footers is mostly waiting for storage
_DESCRIPTION_SECONDS = 30.0  # between two writes of a description, which may have megabytes

Entry = TypeVar("Entry")
Description = TypeVar("Description")


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents(Generic[Entry]):
    """Contents of a Parquet file, as its footer lists them.

    Attributes:
        settings: settings that determine what is made of a video.
        videos: video id to the video's place in the file and its facts.
        failures: video id to the reason why the video is not in the file.
    """

    settings: dict[str, Any]
    videos: dict[str, Entry]
    failures: dict[str, str]


def part(number: int) -> str:
    """Return the name of a Parquet file by its number, counted from 0."""
    return f"part-{number:05d}.parquet"


class FileWriter(Generic[Entry]):
    """Writer of a Parquet file in which each row is a row group.

    Attributes:
        contents: content of the footer; the caller fills in `videos` and `failures`.
        rows: number of rows written so far.
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
    """Kind of folder: the names in it, and the readers and writers of its files.

    Attributes:
        format: format of files and description, with its version.
        folder: name of the folder of the Parquet files, also the word for their content.
        name: name of the file with the description.
        script: name of the script that fills such folders.
        contents: reader and writer of footers.
        description: reader and writer of the description.
        advice: advice about a damaged description, for messages.
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
            mark: bytes near the start of every description, if other programs use the same name.

        Raises:
            UserError: if the description is damaged, or has another format.
        """
        if self.name not in file_sizes(folder):
            return None
        uri = join(folder, self.name)
        content = read_bytes(uri)
        # an empty file, or one of zeros after a loss of power, is ours and damaged
        if mark not in content[:200] and content[:200].strip(b"\0 \r\n\t"):
            return None
        try:
            return self.description.validate_json(content)
        except ValidationError as error:
            listed = "; ".join(shortened([*map(problem_of, error.errors())], 3))
            raise UserError(
                f"{uri} does not have the format {self.format!r}, or is damaged: {listed}. "
                f"{self.advice}"
            ) from error

    def write_description(self, folder: str, description: Description) -> None:
        """Write the description of a folder; an older one is replaced."""
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
        """Write a file, which gets its footer and its name when the block ends.

        `settings` determine what is made of a video; `dictionaries` are columns of repeated values.
        """
        with (
            replacing(uri) as stream,
            # no compression: videos are compressed already, and features shrink by a tenth only;
            # no statistics: minima and maxima of such bytes are of no use
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
            UserError: if the file has another format, or is damaged.
            OSError: if it cannot be reached.
        """
        try:
            parquet = pq.ParquetFile(open_source(uri))
            metadata = parquet.metadata.metadata or {}
            return parquet, self.contents.validate_json(metadata[FOOTER_KEY.encode()])
        except (pa.ArrowInvalid, KeyError, ValueError) as error:
            raise self.unreadable(uri, error) from error

    def unreadable(self, uri: str, error: Exception) -> UserError:
        """Return the error for a damaged file."""
        return UserError(
            f"{uri} does not have the format {self.format!r}, or is damaged ({error}). Remove it, "
            f"and run {self.script} again."
        )

    def read(self, folder: str, settings: Mapping[str, Any]) -> dict[str, Contents[Entry]]:
        """Read the contents of a folder's files from their footers, and require their settings.

        Returns:
            File name to its contents, in the order of the names.

        Raises:
            UserError: if a file is damaged, or was made with settings other than `settings`.
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
        """Raise if files were made with other settings than those wanted.

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
                "settings to continue, or another --output."
            )

    def incomplete(self, folder: str, reason: str = "") -> UserError:
        """Return the error for a folder that is used before it is complete."""
        return UserError(
            f"{folder} is not complete{reason}. Run the same {self.script} command again: it "
            "continues."
        )

    def remove_leftovers(self, folder: str) -> None:
        """Remove the temporary files and notes of a killed run."""
        for place in (folder, self.place(folder), join(folder, NOTES)):
            for name in file_sizes(place):
                if PARTIAL in name or name.endswith(_ENDING):
                    remove(join(place, name))

    def check_failures(
        self, failures: Mapping[str, str], total: int, max_failed: float, *, problem: str
    ) -> None:
        """Raise if too many videos of a run failed; the message says that they `problem`.

        Raises:
            UserError: if more than the share `max_failed` of all `total` videos failed.
        """
        failed = len(failures)
        if failed <= max_failed * total:
            return
        reasons = [f"{video_id}: {reason}" for video_id, reason in sorted(failures.items())]
        listed = "\n".join(f"  {line}" for line in shortened(reasons, rest=f", in {self.name}"))
        raise UserError(
            f"{failed} of {total} videos {problem}, more than the allowed {max_failed:.0%} "
            "(--max-failed). Repair them and run the same command with --retry-failed.\n"
            f"{listed}"
        )


class Refreshed:
    """Writer of a description that is refreshed during a run, at most every 30 seconds."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write, self._written = write, time.perf_counter()

    def refresh(self, *, now: bool = False) -> None:
        """Write the description if the last write is long ago, or unconditionally with `now`."""
        if now or time.perf_counter() - self._written > _DESCRIPTION_SECONDS:
            self._write()
            self._written = time.perf_counter()


class Attempts:
    """Note on the video that is being decoded, for the process that follows a crashed one.

    Ray restarts a task whose process died. Without a note, the task would crash on the same video
    for ever. The note lies beside `uri`, the file that is being made.
    """

    def __init__(self, uri: str) -> None:
        folder, _, name = uri.rpartition("/")
        self._uri = uri + _ENDING
        self._noted = name + _ENDING in file_sizes(folder)
        self._counts: dict[str, int] = json.loads(read_bytes(self._uri)) if self._noted else {}

    def begin(self, video_id: str) -> str:
        """Note the start of a video; return a reason if it was tried too often, else ''."""
        self._counts[video_id] = self._counts.get(video_id, 0) + 1
        with replacing(self._uri) as stream:
            stream.write(json.dumps(self._counts).encode())
        self._noted = True
        if self._counts[video_id] <= _MOST_ATTEMPTS:
            return ""
        times = f"{_MOST_ATTEMPTS} times"
        return f"ended the process that read it, {times}: a crash, or too little memory"

    def end(self, video_id: str) -> None:
        """Forget a finished video; the next `begin` writes the note."""
        del self._counts[video_id]

    def clear(self) -> None:
        """Remove the note, once the file is whole."""
        if self._noted:
            remove(self._uri)
