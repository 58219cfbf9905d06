"""Search for the file of every video."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from re2tal.annotations import Annotations

# In order of preference where a video is there in several formats.
EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_ENDINGS = ", ".join(EXTENSIONS[:-1]) + f" or {EXTENSIONS[-1]}"

_File = TypeVar("_File")


def match_videos(
    video_ids: Iterable[str], files: Mapping[str, _File]
) -> tuple[dict[str, _File], dict[str, str]]:
    """Find the file of every video among those of a folder, local or remote.

    The file of the video `x` is named `x` or, as in ActivityNet, `v_x`, with one of `EXTENSIONS` in
    small or capital letters. Ids are compared with names and never joined to a path, so that none
    can point outside the folder.

    Args:
        video_ids: ids of the videos to find.
        files: files of the folder: name -> path, URI or anything else that stands for the file.

    Returns:
        Video id -> its file; and, for the others, video id -> reason why it has none.
    """
    known = {(Path(name).stem, Path(name).suffix.lower()): files[name] for name in sorted(files)}
    found: dict[str, _File] = {}
    missing: dict[str, str] = {}
    for video_id in video_ids:
        names = [(stem, ext) for stem in (video_id, f"v_{video_id}") for ext in EXTENSIONS]
        name = next((name for name in names if name in known), None)
        if name is None:
            missing[video_id] = f"there is no file {video_id} with the ending {_ENDINGS}"
        else:
            found[video_id] = known[name]
    return found, missing


def find_videos(
    annotations: Annotations, folder: str | Path
) -> tuple[dict[str, Path], dict[str, str]]:
    """Find the file of every annotated video in one local folder, by the rule of `match_videos`.

    The folder is listed once, and no file is opened.

    Args:
        annotations: annotations of the videos to find.
        folder: folder of the files. A link in it that leads outside it is not followed.

    Returns:
        Video id -> resolved path of its file; and, for the others, video id -> reason.

    Raises:
        FileNotFoundError: the folder does not exist.
        NotADirectoryError: the path is not a folder.
    """
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"The video folder {root} does not exist. Check its path.")
    if not root.is_dir():
        raise NotADirectoryError(f"The video folder {root} is not a folder. Check its path.")
    root = root.resolve()
    listed = {entry.name: entry for entry in root.iterdir()}
    entries, missing = match_videos((video.video_id for video in annotations.videos), listed)
    found: dict[str, Path] = {}
    for video_id, entry in entries.items():
        target = entry.resolve()
        if not target.is_relative_to(root):
            missing[video_id] = (
                f"{entry} is a link that leads outside the video folder, to {target}; "
                "give the folder in which the files really are"
            )
        elif not target.is_file():
            missing[video_id] = f"{entry} is not a file, or a link that leads nowhere"
        else:
            found[video_id] = target
    return found, missing
