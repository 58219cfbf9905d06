"""What decoding one video may cost."""

from dataclasses import dataclass, fields
from time import monotonic


class VideoError(Exception):
    """A video that cannot be used: `source` says which one, `reason` why."""

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(source, reason)  # these args let the error travel between processes

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class FrameError(VideoError):
    """A video that shows no intact frame at a time, though it may at others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one call of `decode` or `probe` may cost; a video that needs more is refused.

    Attributes:
        seconds: Of wall time. It is looked at between packets and while a file is waited for; only
            a read of an open file that is passed as source cannot be interrupted.
        pixels: In one picture of the file, whatever the size asked for: the decoder keeps several.
            The default is 8K.
        result_bytes: Of the array that is returned.

    Raises:
        ValueError: A limit is not positive.
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
        """Refuses pictures of too many pixels.

        Raises:
            VideoError: There are more than `pixels`.
        """
        if width * height > self.pixels:
            raise VideoError(
                source,
                f"its pictures of {width}x{height} are over the limit of {self.pixels} pixels: "
                "raise Limits.pixels if they are meant to be that large",
            )

    def check_result(self, source: str, frames: int, height: int, width: int) -> None:
        """Refuses results that are too large, before memory is taken for them.

        Raises:
            VideoError: The RGB frames take more than `result_bytes`.
        """
        needed = frames * height * width * 3
        if needed > self.result_bytes:
            raise VideoError(
                source,
                f"{frames} frames of {width}x{height} take {needed} bytes, over the limit of "
                f"{self.result_bytes}: ask for fewer or smaller ones, or raise Limits.result_bytes",
            )


class Deadline:
    """The end of the time that work on a video may take, which begins now."""

    def __init__(self, source: str, limits: Limits) -> None:
        self._source = source
        self._seconds = limits.seconds
        self._end = monotonic() + limits.seconds

    def check(self) -> None:
        """Stops work that takes too long.

        Raises:
            VideoError: The time is over.
        """
        if monotonic() > self._end:
            raise VideoError(
                self._source,
                f"takes longer than the limit of {self._seconds:g} s: ask for fewer frames, "
                "encode it with key frames closer together, or raise Limits.seconds",
            )
