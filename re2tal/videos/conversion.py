"""Conversion of decoded frames to scaled, upright RGB pictures in a given array."""

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

# Flags of swscale, measured on moving texture, 640x360 to 284x160, against an antialiased resize of
# the full picture. BILINEAR, whose kernel swscale widens when it shrinks, differs by 1.7 grey
# levels, AREA by 3.9 and FAST_BILINEAR by 16: it skips source pixels, so texture flickers from
# frame to frame, which a network takes for motion. Without FULL_CHR_H_INT all of them are 1.5
# levels too dark.
_INTERPOLATION = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT

# Index in RGB of each plane of FFmpeg's format gbrp.
_CHANNELS = (1, 2, 0)


class Converter:
    """Converter of frames to upright RGB pictures of the size fixed by the first frame.

    Args:
        size: short side in pixels; the aspect is kept, with the long side rounded to an even
            number. None keeps the size.
        like: width and height, upright, of the original from which this video was scaled down; the
            result has the shape that a frame of the original would get.
    """

    def __init__(self, size: int | None, *, like: tuple[int, int] | None = None) -> None:
        self._size = size
        self._like = like if size else None
        self._scaled: tuple[int, int] | None = None
        self._reformatter = VideoReformatter()  # it reuses swscale's tables between frames

    def shape(self, frame: VideoFrame) -> tuple[int, int, int]:
        """Return height, width and channels of a frame's picture."""
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
            # When scaling, swscale is more than twice as fast to planar RGB as to packed RGB,
            # because only that path is vectorised; without scaling it is the other way round.
            format="rgb24" if unscaled else "gbrp",
            interpolation=_INTERPOLATION,
            threads=1,
        )
        as_stored = np.rot90(out, -quarters(frame))  # a view: what is written to it lands upright
        if unscaled:
            as_stored[:] = _plane(picture, 0, 3 * width).reshape(height, width, 3)
        else:
            for number, channel in enumerate(_CHANNELS):
                as_stored[..., channel] = _plane(picture, number, width)

    def _scaled_size(self, frame: VideoFrame) -> tuple[int, int]:
        """Return width and height after scaling, in the stored orientation."""
        if self._scaled is None:
            stored = (frame.width, frame.height)
            if self._like is not None:
                stored = self._like[::-1] if quarters(frame) % 2 else self._like
            self._scaled = _short_side(*stored, self._size)
        return self._scaled


def quarters(frame: VideoFrame) -> int:
    """Return the number of counterclockwise quarter turns that make a frame upright."""
    return round(frame.rotation / 90) % 4


def _plane(picture: VideoFrame, number: int, row: int) -> np.ndarray:
    """View the values of a plane, uint8 of shape (height, row), without a copy."""
    plane = picture.planes[number]
    values = np.frombuffer(plane, np.uint8)  # type: ignore[call-overload]
    seen: np.ndarray = values.reshape(-1, plane.line_size)[: picture.height, :row]
    return seen


def _short_side(width: int, height: int, size: int | None) -> tuple[int, int]:
    """Return width and height with a short side of `size`."""
    if size is None:
        return width, height
    long_side = max(2, 2 * round(max(width, height) * size / min(width, height) / 2))
    if width == height:
        return size, size
    return (size, long_side) if width < height else (long_side, size)
