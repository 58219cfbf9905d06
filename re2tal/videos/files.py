"""Search for the file of every video."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TypeVar

from re2tal.annotations import Annotations, normal_form

# In lower case, in order of preference if a video exists in several formats.
EXTENSIONS = (
    *(".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg"),
    *(".vob", ".flv", ".f4v", ".wmv", ".asf", ".3gp", ".3g2", ".ogv", ".ivf"),
    *(".h264", ".264", ".hevc", ".h265", ".265", ".m2v", ".m1v"),
)

_File = TypeVar("_File")


def is_video(name: str) -> bool:
    """Tell if a file has a video's extension, in lower or upper case."""
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


def list_videos(files: Mapping[str, _File]) -> tuple[dict[str, _File], dict[str, str]]:
    """Find all videos among the files of a folder.

    Args:
        files: files of the folder: name -> path, URI or anything else that stands for the file.

    Returns:
        Video id (the file's name without its extension) -> its file; and name -> reason, for the
        ignored files.
    """
    found: dict[str, str] = {}
    passed: dict[str, str] = {}
    for name in sorted(files, key=_preference):
        video_id = normal_form(Path(name).stem)
        if not is_video(name):
            passed[name] = "does not have a video's extension"
        elif video_id in found:
            passed[name] = f"{found[video_id]} has the same name and comes first"
        else:
            found[video_id] = name
    return {Path(name).stem: files[name] for name in sorted(found.values())}, passed


def _preference(name: str) -> tuple[int, str]:
    """Return the sort key of a file among files of one name."""
    ending = PurePosixPath(name).suffix.lower()
    return EXTENSIONS.index(ending) if ending in EXTENSIONS else len(EXTENSIONS), name


def match_videos(
    video_ids: Iterable[str], files: Mapping[str, _File]
) -> tuple[dict[str, _File], dict[str, str]]:
    """Find the file of every video among those of a folder, local or remote.

    The file of video `x` is named `x` or, as in ActivityNet, `v_x`, with one of `EXTENSIONS` in
    lower or upper case. Ids are compared with names and never joined to a path, so no id can point
    outside the folder.

    Args:
        video_ids: ids of the videos to find.
        files: files of the folder: name -> path, URI or anything else that stands for the file.

    Returns:
        Video id -> its file; and, for videos without a file, video id -> reason.
    """
    known = {_parts(name): files[name] for name in sorted(files)}
    found: dict[str, _File] = {}
    missing: dict[str, str] = {}
    for video_id in video_ids:
        stem = normal_form(video_id)
        names = [(named, ext) for named in (stem, f"v_{stem}") for ext in EXTENSIONS]
        name = next((name for name in names if name in known), None)
        if name is None:
            missing[video_id] = f"there is no file {video_id} with a video's extension"
        else:
            found[video_id] = known[name]
    return found, missing


def _parts(name: str) -> tuple[str, str]:
    """Return the normal form of a file's name, for comparison, and its extension."""
    path = PurePosixPath(name)
    return normal_form(path.stem), path.suffix.lower()


def find_videos(
    annotations: Annotations, folder: str | Path
) -> tuple[dict[str, Path], dict[str, str]]:
    """Find the file of every annotated video in one local folder, by the rule of `match_videos`.

    The folder is listed once, and no file is opened.

    Args:
        annotations: annotations of the videos to find.
        folder: folder of the files. Links that lead outside the folder are not followed.

    Returns:
        Video id -> resolved path of its file; and, for videos without one, video id -> reason.

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
                "give the folder that really contains the files"
            )
        elif not target.is_file():
            missing[video_id] = f"{entry} is not a file, or a link that leads nowhere"
        else:
            found[video_id] = target
    return found, missing
