"""What Ray's decoding tasks run for features; without torch, so that they start in a moment."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.decoding import decode_sample
from pipelines.features.sampling import SampledVideo
from pipelines.shards.attempts import Attempts
from pipelines.storage import join


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoJob:
    """A video of which features are made.

    Attributes:
        video_id: the video.
        uri: path or URI of its file, or of the video in a shard.
        sampled: which frames the features are made of.
    """

    video_id: str
    uri: str
    sampled: SampledVideo


def decode_video(
    row: dict[str, Any], *, size: int, batch_size: int, threads: int, notes: str
) -> Iterator[dict[str, Any]]:
    """Decodes a video stretch by stretch, up to the first that cannot be decoded.

    Args:
        row: `video`, a `VideoJob`.
        size: side of the square frames in pixels.
        batch_size: units that go through the backbone at a time.
        threads: of the decoder.
        notes: folder in which videos are noted while they are decoded.

    Returns:
        Of each stretch `video_id`; `number`, from 0 on; `frames`, uint8 (T, size, size, 3);
        `valid`, how many of these show the video; `starts`, the first frame of each unit; and
        `error`, empty if all went well.
    """
    job: VideoJob = row["video"]
    # a video that ends this process, time and again, is given up: Ray would go on for ever
    attempts = Attempts(join(notes, job.video_id))
    attempts.begin(job.video_id)
    if reason := attempts.reason(job.video_id):
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
