"""Videos stored as several files, one for each piece."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from re2tal.videos.decoding import Source, VideoError, decode

# As in the reader: a time that precedes a frame or a piece by rounding only belongs to it.
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """Video cut into files without a gap between them.

    Attributes:
        name: name of the video in errors.
        starts: second of the video at which each piece starts, rising; the times in a piece count
            from there.
        read: function from the number of a piece (from 0) to its content; raises `VideoError`. It
            is called only for pieces that are needed.
        like: width and height, upright, of the original from which the pieces were scaled down.
    """

    name: str
    starts: tuple[float, ...]
    read: Callable[[int], bytes]
    like: tuple[int, int] | None = None


def decode_source(
    source: Source | Pieces, times: np.ndarray, *, size: int | None, threads: int = 1
) -> np.ndarray:
    """Decode a video in one file or in pieces; see `decode` for arguments and errors."""
    if not isinstance(source, Pieces):
        return decode(source, times, size=size, threads=threads)
    times = np.asarray(times, dtype=np.float64)
    if times.ndim != 1 or not times.size:
        raise ValueError(f"decode needs a list of finite times, not one of shape {times.shape}.")
    places = np.searchsorted(source.starts, times + _ROUNDING, side="right") - 1
    places = np.maximum(places, 0)  # times before the first piece
    out: np.ndarray | None = None
    for number in np.unique(places):
        here = places == number
        frames = _decode_piece(source, int(number), times[here], size, threads)
        if len(frames) == len(times):  # all in one piece: no copy
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
