"""Which shard holds which video, for whoever is going to read them."""

from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.shards.layout import FOLDER
from pipelines.shards.manifest import NAME, Manifest
from pipelines.shards.reading import video_uri
from pipelines.shards.settings import ShardError
from pipelines.storage import file_sizes, join


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundVideos:
    """Videos that were looked for in shards.

    Attributes:
        uris: Video id to the URI of the video in its shard.
        failures: Video id to why it is not there.
        durations: Video id to seconds of picture.
        remarks: What may surprise, a sentence each.
    """

    uris: dict[str, str]
    failures: dict[str, str]
    durations: dict[str, float]
    remarks: tuple[str, ...]


def find_in_shards(
    folder: str,
    manifest: Manifest,
    video_ids: Iterable[str],
    *,
    fingerprint: str,
    size: int,
    fps: float | None,
) -> FoundVideos:
    """Finds videos in a folder of shards, by its manifest; no shard is opened.

    Args:
        folder: Path or URI of the folder.
        manifest: Of that folder.
        video_ids: The videos.
        fingerprint: Of the annotations that go with them.
        size: Pixels of the short side for which they are wanted.
        fps: Frames per second at which they are wanted; None if that depends on the video.

    Raises:
        ShardError: Shards are missing, or not whole.
    """
    _require_whole(folder, manifest)
    held = {
        video_id: (file.name, entry)
        for file in manifest.shards
        for video_id, entry in file.videos.items()
    }
    uris, failures, durations = {}, {}, {}
    for video_id in video_ids:
        if video_id in held:
            name, entry = held[video_id]
            uris[video_id] = video_uri(join(join(folder, FOLDER), name), video_id)
            durations[video_id] = entry.duration
        else:
            failures[video_id] = manifest.failures.get(video_id, f"no shard in {folder} holds it")
    remarks = _remarks(manifest, fingerprint=fingerprint, size=size, fps=fps)
    return FoundVideos(uris=uris, failures=failures, durations=durations, remarks=remarks)


def _require_whole(folder: str, manifest: Manifest) -> None:
    if manifest.state != "complete":
        raise ShardError(
            f"{folder} is not complete: {manifest.totals.shards} of {manifest.expected_shards} "
            "shards are there. Give the command with prepare.py that made them again: it goes on."
        )
    sizes = file_sizes(join(folder, FOLDER))
    wrong = [file.name for file in manifest.shards if sizes.get(file.name) != file.bytes]
    if wrong:
        raise ShardError(
            f"{len(wrong)} of the {len(manifest.shards)} shards in {folder} are missing, or not "
            f"those that {NAME} lists: {', '.join(wrong[:5])}{', ...' * (len(wrong) > 5)}. Give "
            "the command with prepare.py that made them again: it makes the missing ones."
        )


def _remarks(
    manifest: Manifest, *, fingerprint: str, size: int, fps: float | None
) -> tuple[str, ...]:
    settings = manifest.settings
    remarks = []
    if manifest.totals.damaged_seconds:
        remarks.append(
            f"{manifest.totals.damaged_seconds:.1f} s of the videos in the shards are damaged in "
            "their files: windows that reach into them fail"
        )
    if settings["annotations"] != fingerprint:
        remarks.append("the shards were made with other annotations; those given now are used")
    if settings["size"] is not None and settings["size"] < size:
        remarks.append(
            f"the shards' frames have {settings['size']} pixels and are enlarged to {size}: make "
            "them anew with a larger --size"
        )
    if settings["fps"] is not None and (fps or 0.0) > settings["fps"]:
        remarks.append(
            f"the shards have {settings['fps']:g} frames per second and {fps:g} are sampled, some "
            "of them twice: make them anew with a higher --fps"
        )
    return tuple(remarks)
