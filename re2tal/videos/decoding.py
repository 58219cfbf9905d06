"""Decoding of the frames that a video file shows at given times, with PyAV (FFmpeg)."""

from dataclasses import dataclass

import numpy as np
from av.video.frame import VideoFrame

from re2tal.videos.conversion import Converter
from re2tal.videos.limits import FrameError, Limits, VideoError
from re2tal.videos.probing import VideoInfo, probe
from re2tal.videos.reader import Source, VideoReader

__all__ = [
    "FrameError",
    "Limits",
    "PartlyDecoded",
    "Source",
    "VideoError",
    "VideoInfo",
    "decode",
    "decode_intact",
    "probe",
]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PartlyDecoded:
    """Frames decoded from a damaged video.

    Attributes:
        frames: RGB, uint8 of shape (T, H, W, 3); black where `intact` is false.
        intact: bool of shape (T,), true for frames that show the video; at least one is true.
        reasons: the different reasons of the other frames, one sentence each.
    """

    frames: np.ndarray
    intact: np.ndarray
    reasons: tuple[str, ...]


def decode(
    source: Source,
    times: np.ndarray,
    *,
    size: int | None,
    threads: int = 1,
    limits: Limits | None = None,
    like: tuple[int, int] | None = None,
) -> np.ndarray:
    """Decode the frames that a video shows at given times.

    The frame at a time is the last one whose time stamp is not later; times count from the first
    frame of the video. This also holds for variable frame rates, and does not depend on the other
    times of the call. Only the part from the key frame before a time to that time is decoded, and
    only requested frames are converted. Memory grows with their number. Interlaced frames are
    returned with both fields woven into one.

    A time up to one frame before the start gives the first frame. A time up to one second
    (`reader.TAIL`) after the end gives the last frame, unless the file was cut off.

    Args:
        source: path, content, or open binary file of the video.
        times: seconds, of shape (T,), in any order.
        size: short side of the result in pixels; the aspect is kept, with the long side rounded to
            an even number. None keeps the size.
        threads: decoding threads; more than one helps with large pictures only.
        limits: limits of the cost; None for the default ones.
        like: width and height of the original, if this video was scaled down from another; the
            result then has the shape, and up to a fraction of a pixel the positions, of frames
            decoded from the original.

    Returns:
        RGB frames, uint8 of shape (T, H, W, 3), contiguous, rotated as the metadata require.

    Raises:
        ValueError: `times` is empty or has entries that are not finite.
        FrameError: the video is damaged at one of the times, or shows nothing then.
        VideoError: the file is not a video, no frame can be decoded, or it exceeds the limits.
    """
    return _decode(source, times, size, threads, limits or Limits(), None, like)


def decode_intact(
    source: Source,
    times: np.ndarray,
    *,
    size: int | None,
    threads: int = 1,
    limits: Limits | None = None,
    like: tuple[int, int] | None = None,
) -> PartlyDecoded:
    """Decode like `decode`, but continue where the video is damaged or shows nothing.

    Raises:
        ValueError: `times` is empty or has entries that are not finite.
        VideoError: no frame is intact, the file is not a video, or it exceeds the limits.
    """
    faults: dict[int, FrameError] = {}
    frames = _decode(source, times, size, threads, limits or Limits(), faults, like)
    intact = np.ones(len(frames), bool)
    intact[list(faults)] = False
    frames[~intact] = 0
    reasons = dict.fromkeys(fault.reason for fault in faults.values())
    return PartlyDecoded(frames=frames, intact=intact, reasons=tuple(reasons))


def _decode(
    source: Source,
    times: np.ndarray,
    size: int | None,
    threads: int,
    limits: Limits,
    faults: dict[int, FrameError] | None,
    like: tuple[int, int] | None,
) -> np.ndarray:
    """Decode frames; record errors by place in `faults`, or raise the first if that is None."""
    times = np.asarray(times, dtype=np.float64)
    if times.ndim != 1 or not times.size or not np.isfinite(times).all():
        raise ValueError(f"decode needs a list of finite times, not one of shape {times.shape}.")
    out: np.ndarray | None = None
    order = np.argsort(times, kind="stable")  # the reader only moves forward
    in_order = times[order].tolist()
    with VideoReader(source, threads=threads, limits=limits, times=in_order) as reader:
        converter = Converter(size, like=like)
        last: VideoFrame | None = None
        last_place = 0
        for place in map(int, order):
            try:
                frame = reader.frame_at(float(times[place]))
            except FrameError as error:
                if faults is None:
                    raise
                faults[place] = error
                continue
            shape = converter.shape(frame)
            if out is None:
                limits.check_picture(reader.name, frame.width, frame.height)
                limits.check_result(reader.name, len(times), *shape[:2])
                out = np.empty((len(times), *shape), np.uint8)
            elif shape != out.shape[1:]:
                raise VideoError(reader.name, "its frames change orientation in the middle")
            if frame is last:  # several times show one frame, which is converted once
                out[place] = out[last_place]
            else:
                converter(frame, out[place])
                last, last_place = frame, place
    if out is None:
        assert faults
        raise next(iter(faults.values()))
    return out
