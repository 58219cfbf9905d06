"""From a video file to an array of the frames that it shows at given times, with PyAV (FFmpeg)."""

from dataclasses import dataclass

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from re2tal.videos.reader import Source, VideoError, VideoReader

__all__ = ["Source", "VideoError", "VideoInfo", "decode", "probe"]

# How a picture is scaled and turned into RGB, measured on moving texture, 640x360 to 284x160,
# against an antialiased resize of the full picture: BILINEAR, whose kernel swscale widens when it
# shrinks, is 1.7 grey levels off, AREA 3.9, and FAST_BILINEAR 16: it skips source pixels, so that
# texture flickers from frame to frame, which a network takes for motion. Without FULL_CHR_H_INT
# all of them are 1.5 levels too dark.
_INTERPOLATION = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT


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
        if _quarters(frame) % 2:
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
        converter = _Converter(size)
        last: VideoFrame | None = None
        picture = np.empty(0, np.uint8)
        for place in np.argsort(times, kind="stable"):
            frame = reader.frame_at(float(times[place]))
            if frame is not last:
                picture, last = converter(frame), frame
            if out is None:
                out = np.empty((len(times), *picture.shape), np.uint8)
            out[place] = picture
    assert out is not None
    return out


class _Converter:
    """Scales frames to the size fixed by the first one, turns them upright and makes them RGB."""

    def __init__(self, size: int | None) -> None:
        self._size = size
        self._shape: tuple[int, int] | None = None
        self._reformatter = VideoReformatter()  # keeps swscale's tables from frame to frame

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        if self._shape is None:
            self._shape = _scaled(frame.width, frame.height, self._size)
        width, height = self._shape
        scaled = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            interpolation=_INTERPOLATION,
            threads=1,
        )
        picture: np.ndarray = scaled.to_ndarray()
        return np.rot90(picture, _quarters(frame))


def _quarters(frame: VideoFrame) -> int:
    """Quarter turns, counterclockwise, that make a frame stand upright."""
    return round(frame.rotation / 90) % 4


def _scaled(width: int, height: int, size: int | None) -> tuple[int, int]:
    """Width and height once the short side is `size`."""
    if size is None:
        return width, height
    long_side = max(2, 2 * round(max(width, height) * size / min(width, height) / 2))
    if width == height:
        return size, size
    return (size, long_side) if width < height else (long_side, size)
