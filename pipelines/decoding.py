"""What Ray's decoding tasks run; without torch, so that their processes start in a moment."""

from typing import Any

import numpy as np

from pipelines.shards.reading import open_video
from pipelines.storage import open_source
from re2tal.videos.decoding import VideoError, probe
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


def probe_sample(row: dict[str, str]) -> dict[str, Any]:
    """Opens a video, to see whether it can be used.

    Args:
        row: `video_id` and `uri`.

    Returns:
        `video_id`; `error`, empty if it is readable; `duration` in seconds, else 0.
    """
    try:
        found = probe(open_source(row["uri"]))
    except (VideoError, OSError) as problem:
        return {"video_id": row["video_id"], "error": str(problem), "duration": 0.0}
    return {"video_id": row["video_id"], "error": "", "duration": found.duration}
