"""Trimmed videos in a folder for each class: `abseiling/0wR5jVB-WPk.mp4`."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from re2tal.datasets.trimmed.listing import Entry, Place, TrimmedList
from re2tal.videos.files import EXTENSIONS


def read_folders(source: str, names: Iterable[str]) -> TrimmedList:
    """Makes a list of the files of a folder; the folder in it where a file lies names its class.

    Files that are no videos, by their ending, are passed over.

    Args:
        source: Where the folder is, for messages.
        names: Paths of the files in it, with slashes.
    """
    entries, problems = [], []
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix.lower() not in EXTENSIONS:
            continue
        if len(path.parts) < 2:
            problems.append(f"{name} lies in no folder of a class")
            continue
        entries.append(
            Entry(
                video_id=str(path.with_suffix("")),
                label=path.parts[0],
                places=(Place(name=name),),
            )
        )
    return TrimmedList(source=source, root=source, entries=tuple(entries), problems=tuple(problems))
