"""Which videos features are to be made of: their files, durations and frame rates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.collection import probe_files
from pipelines.shards.finding import find_in_shards
from pipelines.shards.manifest import Manifest, read_manifest
from pipelines.storage import StorageError, list_files, require
from re2tal.videos.annotations import Annotations
from re2tal.videos.files import EXTENSIONS, match_videos
from re2tal.videos.reader import TAIL


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundVideo:
    """A video that can be read.

    Attributes:
        uri: path or URI of its file, or of the video in a shard.
        duration: seconds over which features are made: those annotated, so that the features fit
            the windows of the annotations, unless the picture ends long before.
        fps: its own frames per second.
    """

    uri: str
    duration: float
    fps: float


@dataclass(frozen=True, kw_only=True)
class Collection:
    """The videos that there are, not yet looked at.

    Attributes:
        subsets: video id to the name of its subset, empty without annotations; all videos, sorted.
        durations: video id to seconds, as annotated.
        files: video id to path or URI, of videos in files of their own.
        missing: video id to why there is none.
    """

    folder: str
    subsets: dict[str, str]
    durations: dict[str, float]
    files: dict[str, str]
    missing: dict[str, str]
    shards: Manifest | None
    fingerprint: str

    def look_at(self, video_ids: Sequence[str]) -> tuple[dict[str, FoundVideo], dict[str, str]]:
        """Opens the files of some videos, in parallel, with Ray Data; shards are known already.

        Args:
            video_ids: which ones.

        Returns:
            Video id to what was found; and, for the others, video id to why it cannot be used.

        Raises:
            ShardError: if shards are missing, or not whole.
        """
        if self.shards is not None:
            return self._in_shards(self.shards, video_ids)
        files = {v: self.files[v] for v in video_ids if v in self.files}
        failures = {v: self.missing[v] for v in video_ids if v in self.missing}
        found = {}
        for row in probe_files(files).to_pylist():
            video_id = row["video_id"]
            if row["error"]:
                failures[video_id] = row["error"]
            else:
                found[video_id] = self._found(video_id, row["uri"], row["duration"], row["fps"])
        return found, failures

    def _in_shards(
        self, manifest: Manifest, video_ids: Sequence[str]
    ) -> tuple[dict[str, FoundVideo], dict[str, str]]:
        held = {k: v for file in manifest.shards for k, v in file.videos.items()}
        there = find_in_shards(
            self.folder, manifest, video_ids, fingerprint=self.fingerprint, size=0, fps=None
        )
        found = {
            video_id: self._found(
                video_id,
                uri,
                held[video_id].duration,
                held[video_id].frames / held[video_id].duration,
            )
            for video_id, uri in there.uris.items()
        }
        return found, dict(there.failures)

    def _found(self, video_id: str, uri: str, measured: float, fps: float) -> FoundVideo:
        duration = self.durations.get(video_id, measured)
        if duration > measured + TAIL:  # what lies behind could not be decoded
            duration = measured
        return FoundVideo(uri=uri, duration=duration, fps=fps)


def collect(
    videos: str | None, annotations: Annotations | None, subsets: Sequence[str]
) -> Collection:
    """Lists the videos; no file is opened.

    Args:
        videos: path or URI of the folder of files or shards.
        annotations: of the videos; None for all that the folder holds.
        subsets: names of the subsets that are wanted; none for all.

    Raises:
        StorageError: if the folder is missing, or holds no videos.
        AnnotationError: if there is no subset of that name.
        ShardError: if the manifest of shards is damaged.
    """
    folder = require(videos, what="The videos", option="--videos")
    manifest = read_manifest(folder)
    files = {} if manifest is not None else list_files(folder)
    if annotations is None:
        names = {Path(n).stem: uri for n, uri in files.items() if Path(n).suffix in EXTENSIONS}
        held = [v for file in manifest.shards for v in file.videos] if manifest else []
        if not names and not held:
            raise StorageError(f"The videos: {folder} holds none of them. Correct --videos.")
        return Collection(
            folder=folder,
            subsets=dict.fromkeys(sorted([*names, *held]), ""),
            durations={},
            files=names,
            missing={},
            shards=manifest,
            fingerprint="",
        )
    wanted = [v for name in subsets for v in annotations.subset(name).videos]
    chosen = sorted(wanted if subsets else annotations.videos, key=lambda v: v.video_id)
    matched, missing = match_videos([v.video_id for v in chosen], files)
    return Collection(
        folder=folder,
        subsets={v.video_id: v.subset for v in chosen},
        durations={v.video_id: v.duration for v in chosen},
        files=matched,
        missing=missing,
        shards=manifest,
        fingerprint=annotations.fingerprint,
    )
