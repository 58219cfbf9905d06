"""Functions of Ray's decoding tasks; without torch, so that their processes start fast."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from pipelines.core.storage import file_size, join, open_source
from pipelines.data.sampling import SampledVideo
from pipelines.data.shards import open_video
from pipelines.data.store import Attempts
from re2tal.videos.limits import VideoError
from re2tal.videos.probing import VideoInfo, probe
from re2tal.videos.windows import Window, window_frames


def decode_sample(row: dict[str, Any], *, size: int, threads: int = 1) -> dict[str, Any]:
    """Decode the window of a row; if decoding fails, its frames are black.

    The row has `index`, `uri` and `window`; frames get `size` pixels a side.

    Returns:
        `index`; `frames`, uint8 (T, size, size, 3); `error`, the reason of a failure, else empty.
    """
    window: Window = row["window"]
    try:
        frames = window_frames(open_video(row["uri"]), window, size=size, threads=threads)
        error = ""
    except (VideoError, OSError) as problem:
        frames = np.zeros((window.grid.length, size, size, 3), np.uint8)
        error = str(problem)
    return {"index": row["index"], "frames": frames, "error": error}


def decode_masked(row: dict[str, Any], *, size: int, threads: int = 1) -> dict[str, Any]:
    """Decode one window as `decode_sample` does, and mark the frames that show the video.

    Returns:
        The fields that `decode_sample` returns, and `mask`, bool (T,), all false after an error.
    """
    sample = decode_sample(row, size=size, threads=threads)
    window: Window = row["window"]
    return {**sample, "mask": window.mask() & (not sample["error"])}


def probe_sample(row: dict[str, str]) -> dict[str, Any]:
    """Open the video of a row (`video_id`, `uri`) and read the facts in its file.

    Returns:
        The row with the fields of `VideoInfo` (`problems` as lines of one text), the file's
        `bytes`, and `error`. A readable file has an empty `error`; otherwise the others are None.
    """
    try:
        found = asdict(probe(open_source(row["uri"]))) | {"bytes": file_size(row["uri"])}
    except (VideoError, OSError) as problem:
        unknown = dict.fromkeys(["bytes", *(field.name for field in fields(VideoInfo))])
        return {**row, **unknown, "error": str(problem)}
    return {**row, **found, "problems": "\n".join(found["problems"]), "error": ""}


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoJob:
    """Video whose features are to be made.

    Attributes:
        uri: path or URI of the video's file, or of the video in a shard.
        sampled: frames that the features are made from.
    """

    video_id: str
    uri: str
    sampled: SampledVideo


def decode_video(
    row: dict[str, Any], *, size: int, batch_size: int, threads: int, notes: str
) -> Iterator[dict[str, Any]]:
    """Decode a video (`row["video"]`) stretch by stretch, up to the first that cannot be decoded.

    Stretches hold whole batches of units; `notes` is a folder of notes on the videos being decoded.

    Yields:
        For each stretch `video_id`; `number`, counted from 0; `frames`, uint8 (T, size, size, 3);
        `valid`, the number of frames that show the video; `starts`, the first frame of each unit;
        and `error`, the reason of a failure, else empty.
    """
    job: VideoJob = row["video"]
    # a video that crashes this process repeatedly is given up: Ray would retry it for ever
    attempts = Attempts(join(notes, job.video_id))
    if reason := attempts.begin(job.video_id):
        yield _failed(job, 0, reason)
    else:
        stretches = job.sampled.stretches(size=size, batch_size=batch_size)
        for number, stretch in enumerate(stretches):
            sample = decode_sample(
                {"index": number, "uri": job.uri, "window": stretch.window},
                size=size,
                threads=threads,
            )
            if sample["error"]:
                yield _failed(job, number, sample["error"])
                break
            yield {
                "video_id": job.video_id,
                "number": number,
                "frames": sample["frames"],
                "valid": stretch.window.valid,
                "starts": stretch.starts,
                "error": "",
            }
    attempts.clear()


def _failed(job: VideoJob, number: int, error: str) -> dict[str, Any]:
    return {
        "video_id": job.video_id,
        "number": number,
        "frames": np.zeros((1, 1, 1, 3), np.uint8),
        "valid": 0,
        "starts": np.zeros(1, np.int64),
        "error": error,
    }
