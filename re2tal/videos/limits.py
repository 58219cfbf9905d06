"""Limits of the cost of decoding one video."""

from dataclasses import dataclass, fields
from time import monotonic


class VideoError(Exception):
    """Error of a video that cannot be used: its `source` and the `reason`."""

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(source, reason)  # these args let the error travel between processes

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class FrameError(VideoError):
    """Error of a video that shows no intact frame at a time, though it may at others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of one call of `decode` or `probe`; a video that needs more is refused.

    Attributes:
        seconds: wall time. It is checked between packets and while waiting for a file; only a read
            of an open file that is passed as source cannot be interrupted.
        pixels: pixels in one picture of the file, whatever the size asked for: the decoder keeps
            several pictures. The default is 8K.
        result_bytes: bytes of the array that is returned.

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
    """Time limit of the work on a video, counted from now."""

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
