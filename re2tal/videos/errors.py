"""What goes wrong with videos."""


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
