"""Limits of the cost of decoding one video."""

from dataclasses import dataclass, fields
from time import monotonic


class VideoError(Exception):
    """Error of a video that cannot be used, with its `source` and the `reason`."""

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(source, reason)  # with these args the error can be pickled

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class FrameError(VideoError):
    """Error of a video without an intact frame at one time; other times may be fine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of one call of `decode` or `probe`; a video that needs more is refused.

    Attributes:
        seconds: wall time. It is checked between packets and while waiting for a file; only the
            read of an open file that is given as source cannot be interrupted.
        pixels: pixels of one picture in the file, whatever the requested size, because the decoder
            keeps several pictures. The default is 8K.
        result_bytes: bytes of the returned array.

    Raises:
        ValueError: a limit is not positive.
    """

    seconds: float = 600.0
    pixels: int = 8192 * 4320
    result_bytes: int = 8 << 30

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not value > 0:
                raise ValueError(f"Limits.{limit.name} must be positive, not {value}.")

    def check_picture(self, source: str, width: int, height: int) -> None:
        """Refuse pictures of too many pixels.

        Raises:
            VideoError: there are more than `pixels`.
        """
        if width * height > self.pixels:
            raise VideoError(
                source,
                f"its pictures of {width}x{height} are over the limit of {self.pixels} pixels: "
                "raise Limits.pixels if they are meant to be that large",
            )

    def check_result(self, source: str, frames: int, height: int, width: int) -> None:
        """Refuse results that are too large, before memory is allocated.

        Raises:
            VideoError: the RGB frames take more than `result_bytes`.
        """
        needed = frames * height * width * 3
        if needed > self.result_bytes:
            raise VideoError(
                source,
                f"{frames} frames of {width}x{height} take {needed} bytes, over the limit of "
                f"{self.result_bytes}: ask for fewer or smaller ones, or raise Limits.result_bytes",
            )


class Deadline:
    """Time limit of the work on a video, counted from construction."""

    def __init__(self, source: str, limits: Limits) -> None:
        self._source = source
        self._seconds = limits.seconds
        self._end = monotonic() + limits.seconds

    def check(self) -> None:
        """Stop work that takes too long.

        Raises:
            VideoError: the time is over.
        """
        if monotonic() > self._end:
            raise VideoError(
                self._source,
                f"takes longer than the limit of {self._seconds:g} s: ask for fewer frames, "
                "encode it with key frames closer together, or raise Limits.seconds",
            )
