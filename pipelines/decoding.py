"""What Ray's decoding tasks run; without torch, so that their processes start in a moment."""

from dataclasses import asdict, fields
from typing import Any

import numpy as np

from pipelines.shards.reading import open_video
from pipelines.storage import file_size, open_source
from re2tal.videos.errors import VideoError
from re2tal.videos.probing import VideoInfo, probe
from re2tal.videos.windows import Window, window_frames


def decode_sample(row: dict[str, Any], *, size: int, threads: int = 1) -> dict[str, Any]:
    """Decodes one window; what cannot be decoded comes back black, with the reason.

    Args:
        row: `index`, `uri` and `window`.
        size: side of the square frames in pixels.
        threads: of the decoder.

    Returns:
        `index`; `frames`, uint8 (T, size, size, 3); `error`, empty if all went well.
    """
    window: Window = row["window"]
    try:
        frames = window_frames(open_video(row["uri"]), window, size=size, threads=threads)
        error = ""
    except (VideoError, OSError) as problem:
        frames = np.zeros((window.grid.length, size, size, 3), np.uint8)
        error = str(problem)
    return {"index": row["index"], "frames": frames, "error": error}


def decode_masked(row: dict[str, Any], *, size: int) -> dict[str, Any]:
    """Decodes one window as `decode_sample` does, and tells which of its frames show the video.

    Args:
        row: `index`, `uri` and `window`.
        size: side of the square frames in pixels.

    Returns:
        What `decode_sample` returns, and `mask`, bool (T,), all false if there is an error.
    """
    sample = decode_sample(row, size=size)
    window: Window = row["window"]
    return {**sample, "mask": window.mask() & (not sample["error"])}


def probe_sample(row: dict[str, str]) -> dict[str, Any]:
    """Opens a video, to see whether it can be used, and what its file says.

    Args:
        row: `video_id` and `uri`.

    Returns:
        The row with the fields of `VideoInfo`, its problems as lines of one text, the file's
        `bytes`, and `error`, empty if it is readable; if it is not, the others are None.
    """
    try:
        found = asdict(probe(open_source(row["uri"]))) | {"bytes": file_size(row["uri"])}
    except (VideoError, OSError) as problem:
        unknown = dict.fromkeys(["bytes", *(field.name for field in fields(VideoInfo))])
        return {**row, **unknown, "error": str(problem)}
    return {**row, **found, "problems": "\n".join(found["problems"]), "error": ""}
