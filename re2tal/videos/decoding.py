"""From a video file to an array of the frames that it shows at given times, with PyAV (FFmpeg)."""

from dataclasses import dataclass

import av
import numpy as np
from av.video.frame import VideoFrame

from re2tal.videos.conversion import Converter, quarters
from re2tal.videos.reader import Source, VideoError, VideoReader

__all__ = ["Source", "VideoError", "VideoInfo", "decode", "probe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What a file says of its video.

    Attributes:
        duration: Seconds of picture.
        fps: Mean frames per second.
        width: Pixels across, after the rotation that the metadata ask for.
        height: Pixels down, likewise.
        frames: Number of frames; from duration and fps where the header has none, as in WebM.
    """

    duration: float
    fps: float
    width: int
    height: int
    frames: int


def probe(source: Source) -> VideoInfo:
    """Reads what a file says of its video, and decodes its first frame to see that it can be.

    Args:
        source: Path, content, or open binary file of the video.

    Raises:
        VideoError: The file is no video, its first frame cannot be decoded, or its header lacks
            the duration or the frame rate.
    """
    with VideoReader(source) as reader:
        frame = reader.frame_at(0.0)
        width, height = frame.width, frame.height
        if quarters(frame) % 2:
            width, height = height, width
        stream = reader.stream
        rate = stream.average_rate or stream.guessed_rate
        if stream.duration and stream.time_base:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = (reader.container.duration or 0) / av.time_base
        if not duration or not rate:
            raise VideoError(reader.name, "its header lacks the duration or the frame rate")
        return VideoInfo(
            duration=duration,
            fps=float(rate),
            width=width,
            height=height,
            frames=stream.frames or round(duration * rate),
        )


def decode(source: Source, times: np.ndarray, *, size: int | None, threads: int = 1) -> np.ndarray:
    """Decodes the frames that a video shows at given times.

    The frame shown at a time is the last one presented by then, by its time stamp and counting
    from the first frame of the video: variable frame rates need no care. It is the same whichever
    other times are asked for. Only what lies between the key frame before a time and the time is
    decoded, and only frames that are asked for are converted. Memory goes with their number.

    A time up to a frame before the start gives the first frame, one up to a second (`reader.TAIL`)
    after the end the last.

    Args:
        source: Path, content, or open binary file of the video.
        times: Seconds, of shape (T,), in any order.
        size: The short side in pixels to which frames are scaled, keeping the aspect (the long
            side is rounded to an even number); None keeps their size.
        threads: Decoding threads; more than one helps with large pictures only.

    Returns:
        RGB frames, uint8 of shape (T, H, W, 3), contiguous, as the rotation metadata turn them.

    Raises:
        ValueError: `times` is empty or has entries that are not finite.
        VideoError: The file is no video, is damaged, or shows nothing at one of the times.
    """
    times = np.asarray(times, dtype=np.float64)
    if times.ndim != 1 or not times.size or not np.isfinite(times).all():
        raise ValueError(f"decode needs a list of finite times, not one of shape {times.shape}.")
    out: np.ndarray | None = None
    with VideoReader(source, threads=threads) as reader:
        converter = Converter(size)
        last: VideoFrame | None = None
        last_place = 0
        for place in np.argsort(times, kind="stable"):
            frame = reader.frame_at(float(times[place]))
            if out is None:
                out = np.empty((len(times), *converter.shape(frame)), np.uint8)
            if frame is last:
                out[place] = out[last_place]
            else:
                converter(frame, out[place])
                last, last_place = frame, place
    assert out is not None
    return out
