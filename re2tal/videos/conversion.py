"""Conversion of decoded frames to RGB pictures: scaled, upright, written into a given array."""

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

# How a picture is scaled and turned into RGB, measured on moving texture, 640x360 to 284x160,
# against an antialiased resize of the full picture: BILINEAR, whose kernel swscale widens when it
# shrinks, is 1.7 grey levels off, AREA 3.9, and FAST_BILINEAR 16: it skips source pixels, so that
# texture flickers from frame to frame, which a network takes for motion. Without FULL_CHR_H_INT
# all of them are 1.5 levels too dark.
_INTERPOLATION = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT

# Planes of FFmpeg's format gbrp in the order of RGB.
_CHANNELS = (1, 2, 0)


class Converter:
    """Converter of frames to upright RGB pictures of the size fixed by the first frame.

    Args:
        size: short side in pixels, keeping the aspect (the long side is rounded to an even
            number); None keeps the size.
        like: width and height, upright, of the video from which this one was scaled down; the
            result has the shape that a frame of that video would get.
    """

    def __init__(self, size: int | None, *, like: tuple[int, int] | None = None) -> None:
        self._size = size
        self._like = like if size else None
        self._scaled: tuple[int, int] | None = None
        self._reformatter = VideoReformatter()  # keeps swscale's tables from frame to frame

    def shape(self, frame: VideoFrame) -> tuple[int, int, int]:
        """Height, width and channels of a frame's picture."""
        width, height = self._scaled_size(frame)
        return (width, height, 3) if quarters(frame) % 2 else (height, width, 3)

    def __call__(self, frame: VideoFrame, out: np.ndarray) -> None:
        """Convert a decoder's frame into `out`, uint8 RGB of shape `shape(frame)`."""
        width, height = self._scaled_size(frame)
        unscaled = (width, height) == (frame.width, frame.height)
        picture = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            # swscale scales to RGB in planes more than twice as fast as to RGB in one, because it
            # has vector instructions for that; without scaling it is the other way round
            format="rgb24" if unscaled else "gbrp",
            interpolation=_INTERPOLATION,
            threads=1,
        )
        as_stored = np.rot90(out, -quarters(frame))
        if unscaled:
            as_stored[:] = _plane(picture, 0, 3 * width).reshape(height, width, 3)
        else:
            for number, channel in enumerate(_CHANNELS):
                as_stored[..., channel] = _plane(picture, number, width)

    def _scaled_size(self, frame: VideoFrame) -> tuple[int, int]:
        """Width and height after scaling, as stored."""
        if self._scaled is None:
            stored = (frame.width, frame.height)
            if self._like is not None:
                stored = self._like[::-1] if quarters(frame) % 2 else self._like
            self._scaled = _short_side(*stored, self._size)
        return self._scaled


def quarters(frame: VideoFrame) -> int:
    """Quarter turns, counterclockwise, that make a frame stand upright."""
    return round(frame.rotation / 90) % 4


def _plane(picture: VideoFrame, number: int, row: int) -> np.ndarray:
    """Values of a plane, uint8 of shape (height, row), without a copy."""
    plane = picture.planes[number]
    values = np.frombuffer(plane, np.uint8)  # type: ignore[call-overload]
    seen: np.ndarray = values.reshape(-1, plane.line_size)[: picture.height, :row]
    return seen


def _short_side(width: int, height: int, size: int | None) -> tuple[int, int]:
    """Width and height once the short side is `size`."""
    if size is None:
        return width, height
    long_side = max(2, 2 * round(max(width, height) * size / min(width, height) / 2))
    if width == height:
        return size, size
    return (size, long_side) if width < height else (long_side, size)
