"""Which file holds which video."""

from pathlib import Path

from re2tal.videos.annotations import Annotations

# In the order in which they are looked for when a video is there in several formats.
EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")


def find_videos(
    annotations: Annotations, folder: str | Path
) -> tuple[dict[str, Path], dict[str, str]]:
    """Finds the file of every annotated video in one folder.

    The file of the video `x` is `x` or, as ActivityNet names them, `v_x`, with one of
    `EXTENSIONS` in small or capital letters. The folder is listed once, and no file is opened.

    Args:
        annotations: The videos to look for.
        folder: Where the files lie. A link in it that leads outside it is not followed.

    Returns:
        Video id -> resolved path of its file; and, for the others, video id -> why there is none.

    Raises:
        FileNotFoundError: The folder does not exist.
        NotADirectoryError: It is not a folder.
    """
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"The video folder {root} does not exist. Check its path.")
    if not root.is_dir():
        raise NotADirectoryError(f"The video folder {root} is not a folder. Check its path.")
    root = root.resolve()
    # ids are compared with the names that are there and never joined to a path, so that none can
    # point outside the folder
    files = {(entry.stem, entry.suffix.lower()): entry for entry in sorted(root.iterdir())}
    found: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for video in annotations.videos:
        names = [(stem, ext) for stem in _stems(video.video_id) for ext in EXTENSIONS]
        entry = next((files[name] for name in names if name in files), None)
        if entry is None:
            missing[video.video_id] = (
                f"no file {video.video_id}{{{','.join(EXTENSIONS)}}} in {root}"
            )
            continue
        target = entry.resolve()
        if not target.is_relative_to(root):
            missing[video.video_id] = (
                f"{entry} is a link that leads outside the video folder, to {target}; "
                "give the folder in which the files really are"
            )
        elif not target.is_file():
            missing[video.video_id] = f"{entry} is not a file, or a link that leads nowhere"
        else:
            found[video.video_id] = target
    return found, missing


def _stems(video_id: str) -> tuple[str, str]:
    """File names that a video may have, without their extensions."""
    return video_id, f"v_{video_id}"
