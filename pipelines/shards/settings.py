"""What decides what shards hold, and which videos lie in which of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from re2tal.videos.annotations import VideoAnnotation
from re2tal.videos.transcoding import TranscodeConfig

FORMAT = "re2tal shards 1"


class ShardError(Exception):
    """Shards that cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSettings:
    """What decides, with the videos, what shards hold.

    Attributes:
        fingerprint: Of the annotations.
        subsets: Names of the subsets that are encoded, sorted.
        transcode: How the videos are encoded.
        shard_seconds: About so many seconds of video lie in a shard.
    """

    fingerprint: str
    subsets: tuple[str, ...]
    transcode: TranscodeConfig = field(default_factory=TranscodeConfig)
    shard_seconds: float = 900.0

    def __post_init__(self) -> None:
        if not self.shard_seconds > 0:
            raise ValueError(f"shard_seconds must be positive, not {self.shard_seconds}.")

    def described(self) -> dict[str, Any]:
        """The settings as they stand in shards and manifest."""
        flat = {
            "format": FORMAT,
            "annotations": self.fingerprint,
            "subsets": list(self.subsets),
            **asdict(self.transcode),
            "shard_seconds": float(self.shard_seconds),
        }
        return {k: float(v) if k in ("fps", "piece_seconds") and v else v for k, v in flat.items()}


def require_equal(wanted: dict[str, Any], there: dict[str, Any], folder: str) -> None:
    """Checks that shards were made with the settings that are asked for.

    Args:
        wanted: What `ShardSettings.described` returns.
        there: The same, from a shard.
        folder: Of the shards, for the message.

    Raises:
        ShardError: It says what differs.
    """
    names = [name for name in {**wanted, **there} if wanted.get(name) != there.get(name)]
    if names:
        listed = "; ".join(
            f"{name}: {there.get(name)} there, {wanted.get(name)} asked for" for name in names
        )
        raise ShardError(
            f"{folder} holds shards of other settings ({listed}). Give the same settings to go on "
            "with them, or another --output."
        )


def pack(
    videos: Sequence[VideoAnnotation], seconds: float
) -> dict[str, tuple[VideoAnnotation, ...]]:
    """Puts videos into shards: in the order of their ids, about as many seconds into each.

    Args:
        videos: All of them.
        seconds: In a shard; a longer video has one for itself.

    Returns:
        File name of each shard to its videos. It depends on nothing else.
    """
    shards: list[list[VideoAnnotation]] = []
    filled = 0.0
    for video in sorted(videos, key=lambda video: video.video_id):
        if not shards or filled + video.duration > seconds:
            shards.append([])
            filled = 0.0
        shards[-1].append(video)
        filled += video.duration
    return {f"part-{number:05d}.parquet": tuple(held) for number, held in enumerate(shards)}
