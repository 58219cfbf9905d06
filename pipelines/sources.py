"""The videos that a command line names: files, folders and patterns, by path or by URI."""

import glob
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pipelines.storage import StorageError, is_folder, list_files, require
from re2tal.videos.files import EXTENSIONS


def find_sources(places: Sequence[str], *, option: str) -> dict[str, str]:
    """Finds videos, and names them by their files.

    Args:
        places: files, whatever their ending; folders, of which the files with the ending of a video
            count; patterns with `*`, `?`, `[...]` and, in paths, `**`. Paths or URIs.
        option: the command-line option that sets them.

    Returns:
        Video id, which is the file's name without its ending, to absolute path or URI.

    Raises:
        StorageError: if a place does not exist or holds no video, or two videos have one name.
    """
    if not places:
        raise StorageError(f"The videos: none given. Say which with {option} FILE_OR_FOLDER ...")
    uris = [uri for place in places for uri in _files(place, option)]
    found: dict[str, str] = {}
    for uri in dict.fromkeys(uris):  # one that two patterns match is one video
        video_id = Path(uri).stem
        if video_id in found:
            raise StorageError(
                f"The videos: {found[video_id]} and {uri} have one name, which would make their "
                f"results one. Rename one, or give them to {option} of separate runs."
            )
        found[video_id] = uri
    return dict(sorted(found.items()))


def _files(place: str, option: str) -> list[str]:
    """The videos of one place."""
    if _is_pattern(place):
        found = _matches(place, option)
    else:
        uri = require(place, what="The videos", option=option)
        found = _videos(uri) if is_folder(uri) else [uri]
    if not found:
        what = "matches no file" if _is_pattern(place) else f"holds no video ({_ENDINGS})"
        raise StorageError(f"The videos: {place} {what}. Correct {option}.")
    return found


_ENDINGS = ", ".join(EXTENSIONS)


def _is_pattern(place: str) -> bool:
    """A file may be named with brackets; then it is no pattern."""
    return glob.has_magic(place) and ("://" in place or not Path(place).expanduser().exists())


def _matches(pattern: str, option: str) -> list[str]:
    if "://" not in pattern:
        whole = Path(pattern).expanduser().absolute()
        paths = Path(whole.anchor).glob(str(whole.relative_to(whole.anchor)))
        return sorted(str(path) for path in paths if path.is_file())
    folder, _, name = pattern.rpartition("/")
    if glob.has_magic(folder):
        raise StorageError(
            f"The videos: {pattern} has a wildcard in the name of a folder, and in a URI only that "
            f"of the file may have one. Correct {option}."
        )
    files = list_files(require(folder, what="The videos", option=option))
    return [uri for file, uri in files.items() if fnmatchcase(file, name)]


def _videos(folder: str) -> list[str]:
    return [uri for name, uri in list_files(folder).items() if _is_video(name)]


def _is_video(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS
