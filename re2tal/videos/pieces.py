"""Videos that lie in pieces: each stretch of them a file of its own."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from re2tal.videos.decoding import Source, VideoError, decode

# As in the reader: a time that lies before a frame, or a piece, only by rounding is meant to be in
# it.
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """A video cut into files that follow one another without a gap.

    Attributes:
        name: What errors call the video.
        starts: Second of the video at which each piece starts, rising; its own times count from
            there.
        read: Gives the content of the piece of a number, from 0 on, or raises a `VideoError`. It is
            asked only for those that are needed.
        like: Width and height, upright, of the video from which the pieces were scaled down.
    """

    name: str
    starts: tuple[float, ...]
    read: Callable[[int], bytes]
    like: tuple[int, int] | None = None


def decode_source(
    source: Source | Pieces, times: np.ndarray, *, size: int | None, threads: int = 1
) -> np.ndarray:
    """Like `decode`, for a video in one file or in pieces.

    Args:
        source: The video.
        times: Seconds of the video, of shape (T,), in any order.
        size: The short side in pixels; None keeps the size.
        threads: Decoding threads.

    Returns:
        RGB frames, uint8 of shape (T, H, W, 3), contiguous.

    Raises:
        ValueError: `times` is empty or has entries that are not finite.
        VideoError: The video is damaged, or shows nothing at one of the times.
    """
    if not isinstance(source, Pieces):
        return decode(source, times, size=size, threads=threads)
    times = np.asarray(times, dtype=np.float64)
    if times.ndim != 1 or not times.size:
        raise ValueError(f"decode needs a list of finite times, not one of shape {times.shape}.")
    places = np.searchsorted(source.starts, times + _ROUNDING, side="right") - 1
    places = np.maximum(places, 0)
    out: np.ndarray | None = None
    for number in np.unique(places):
        here = places == number
        frames = _decode_piece(source, int(number), times[here], size, threads)
        if len(frames) == len(times):
            return frames
        if out is None:
            out = np.empty((len(times), *frames.shape[1:]), np.uint8)
        out[here] = frames
    assert out is not None
    return out


def _decode_piece(
    pieces: Pieces, number: int, times: np.ndarray, size: int | None, threads: int
) -> np.ndarray:
    start = pieces.starts[number]
    try:
        content = pieces.read(number)
        return decode(content, times - start, size=size, threads=threads, like=pieces.like)
    except VideoError as error:
        where = f"piece {number}, whose times count from second {start:.2f}"
        raise type(error)(pieces.name, f"{where}: {error.reason}") from error
