"""A folder that is being filled with features, video by video; a killed run goes on with it."""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import numpy as np

from pipelines.core.clock import duration
from pipelines.core.storage import PARTIAL, file_sizes, join, list_files, remove, require
from pipelines.data.features import (
    FOLDER,
    NAME,
    Description,
    ExtractedVideo,
    FeatureType,
    Layout,
    SampledVideo,
    Sampling,
    VideoEntry,
    in_actionformers_words,
    read_contents,
    read_description,
    read_rows,
    write_description,
    write_npy,
    write_parquet,
)
from pipelines.data.shards import Manifest, find_in_shards, read_manifest
from pipelines.data.videos import probe_files
from re2tal.annotations import Annotations
from re2tal.errors import UserError
from re2tal.videos.files import EXTENSIONS, match_videos
from re2tal.videos.reader import TAIL

_DESCRIPTION_SECONDS = 30.0  # from one writing of it to the next: it may have megabytes
_READERS = 16  # footers are waited for more than they are read


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesConfig:
    """How features are written.

    Attributes:
        layout: "npy", a file for each video, as ActionFormer reads them; "parquet", files of some
            videos each.
        prefix: of the names of `.npy` files, before the video's id; `v_` is usual for ActivityNet.
        feature_type: float32, as published features are, or float16, half as large.
        videos_per_file: of a Parquet file.
    """

    layout: Layout = "npy"
    prefix: str = ""
    feature_type: FeatureType = "float32"
    videos_per_file: int = 8

    def __post_init__(self) -> None:
        if self.videos_per_file < 1:
            raise ValueError(f"--videos-per-file must be at least 1, not {self.videos_per_file}.")


@dataclass(kw_only=True)
class _Part:
    """The videos that one file is to hold.

    Attributes:
        video_ids: all of them.
        waiting: those that are not through yet.
        made: those that are.
    """

    video_ids: tuple[str, ...]
    waiting: set[str] = field(default_factory=set)
    made: dict[str, ExtractedVideo] = field(default_factory=dict)


class FeatureFolder:
    """Collects the features of videos, and writes each file once all of its videos are through.

    Args:
        uri: path or URI of the folder.
        config: how features are written.
        video_ids: all videos.
        settings: what decides their features.
        sampling: how videos are sampled.
        channels: C.

    Raises:
        UserError: if the folder holds features of other settings, or damaged ones.
    """

    def __init__(
        self,
        uri: str,
        config: FilesConfig,
        video_ids: Sequence[str],
        *,
        settings: dict[str, Any],
        sampling: Sampling,
        channels: int,
    ) -> None:
        self._uri, self._config = uri, config
        # as they come back from a file: tuples are lists there
        self._settings = json.loads(json.dumps({**settings, "feature_type": config.feature_type}))
        self._all = tuple(sorted(video_ids))
        npy = config.layout == "npy"
        self._actionformer = in_actionformers_words(sampling, channels) if npy else {}
        self._channels = channels
        self._entries: dict[str, VideoEntry] = {}
        self._failures: dict[str, str] = {}
        self._parts = self._pack()
        self._of = {v: name for name, part in self._parts.items() for v in part.video_ids}
        self._written = time.perf_counter()
        self._read()

    @property
    def description(self) -> Description:
        """What the folder holds."""
        through = self._entries.keys() | self._failures.keys()
        return Description(
            state="complete" if through >= set(self._all) else "incomplete",
            layout=self._config.layout,
            prefix=self._config.prefix,
            channels=self._channels,
            actionformer=self._actionformer,
            settings=self._settings,
            software={
                "re2tal": version("re2tal"),
                "torch": version("torch"),
                "av": av.__version__,
            },
            videos=dict(sorted(self._entries.items())),
            failures=dict(sorted(self._failures.items())),
        )

    def begin(self, *, retry_failed: bool) -> list[str]:
        """Removes what a killed run left behind, and says what is to be done.

        Args:
            retry_failed: try the videos that failed before once more.

        Returns:
            The videos of which features are to be made.
        """
        for place in (self._uri, join(self._uri, FOLDER), self.notes):
            for name in file_sizes(place):
                if PARTIAL in name or place == self.notes:
                    remove(join(place, name))
        if retry_failed:
            self._failures.clear()
        for part in self._parts.values():
            part.waiting = {
                v for v in part.video_ids if v not in self._entries and v not in self._failures
            }
        self.write_description()
        return [v for v in self._all if v in self._parts[self._of[v]].waiting]

    @property
    def notes(self) -> str:
        """Folder for notes on what is being decoded."""
        return join(self._uri, "being_decoded")

    def add(self, video_id: str, video: ExtractedVideo) -> None:
        """Takes the features of a video.

        Args:
            video_id: the video.
            video: what was made of it, float32.
        """
        features = video.features.astype(np.dtype(self._config.feature_type))
        part = self._parts[self._of[video_id]]
        part.made[video_id] = replace(video, features=features)
        self._through(video_id)

    def fail(self, video_id: str, reason: str) -> None:
        """Takes note of a video that has no features.

        Args:
            video_id: the video.
            reason: why.
        """
        self._failures[video_id] = reason
        self._through(video_id)

    def holds(self, video_id: str) -> bool:
        """Whether the file of a video is there, though `features.json` does not know of it yet."""
        return self._config.layout == "npy" and self._of[video_id] in self._names

    def adopt(self, video_id: str, entry: VideoEntry) -> None:
        """Takes a file that is there.

        Args:
            video_id: the video.
            entry: where its features lie.
        """
        name = self._of[video_id]
        self._entries[video_id] = replace(entry, file=name)
        self._parts[name].waiting.discard(video_id)

    def write_description(self) -> None:
        """Writes `features.json`."""
        write_description(self._uri, self.description)
        self._written = time.perf_counter()

    def _through(self, video_id: str) -> None:
        name = self._of[video_id]
        part = self._parts[name]
        part.waiting.discard(video_id)
        if not part.waiting:
            self._write(name, part)
        if time.perf_counter() - self._written > _DESCRIPTION_SECONDS:
            self.write_description()

    def _write(self, name: str, part: _Part) -> None:
        """Writes the file of a part all of whose videos are through."""
        uri = join(self._uri, name)
        if self._config.layout == "npy":
            for video_id, video in part.made.items():
                write_npy(uri, video.features)
                self._entries[video_id] = replace(video.entry, file=name)
        else:
            kept = [self._entries[v].row for v in part.video_ids if v in self._entries]
            contents = write_parquet(
                uri,
                {**(read_rows(uri, kept) if kept else {}), **part.made},
                name=name,
                kind=self._config.feature_type,
                settings=self._settings,
                failures={v: self._failures[v] for v in part.video_ids if v in self._failures},
            )
            self._entries.update(contents.videos)
        part.made.clear()

    def _pack(self) -> dict[str, _Part]:
        """Which videos go into which file; it depends on their ids alone."""
        if self._config.layout == "npy":
            return {f"{self._config.prefix}{v}.npy": _Part(video_ids=(v,)) for v in self._all}
        # which file holds which video depends on all of them
        listed = hashlib.sha256("\n".join(self._all).encode()).hexdigest()
        self._settings |= {"videos": listed, "videos_per_file": self._config.videos_per_file}
        step = self._config.videos_per_file
        return {
            f"{FOLDER}/part-{first // step:05d}.parquet": _Part(
                video_ids=self._all[first : first + step]
            )
            for first in range(0, len(self._all), step)
        }

    def _read(self) -> None:
        """Looks at what is there."""
        names = file_sizes(self._uri)
        self._names = frozenset(names)
        if NAME in names:
            there = read_description(self._uri)
            _require_equal(self._uri, self._settings, there.settings)
            if there.layout != self._config.layout or there.prefix != self._config.prefix:
                raise UserError(
                    f"{self._uri} holds features as {there.layout} files with the prefix "
                    f"{there.prefix!r}. Give the same to go on with them, or another --output."
                )
            if there.layout == "npy":
                self._entries = {k: v for k, v in there.videos.items() if v.file in names}
            self._failures = {k: v for k, v in there.failures.items() if k in self._of}
        elif any(name.endswith(".npy") for name in names):
            raise UserError(
                f"{self._uri} holds .npy files, and no {NAME} that says what they are. Give "
                "another --output."
            )
        if self._config.layout == "parquet":
            self._read_footers()

    def _read_footers(self) -> None:
        folder = join(self._uri, FOLDER)
        uris = [join(folder, name) for name in file_sizes(folder) if name.endswith(".parquet")]
        with ThreadPoolExecutor(max_workers=_READERS) as pool:
            for contents in pool.map(read_contents, uris):
                _require_equal(self._uri, self._settings, contents.settings)
                self._entries.update(contents.videos)
                self._failures.update(contents.failures)


def _require_equal(folder: str, wanted: dict[str, Any], there: dict[str, Any]) -> None:
    names = [name for name in {**wanted, **there} if wanted.get(name) != there.get(name)]
    if names:
        listed = "; ".join(
            f"{name}: {there.get(name)} there, {wanted.get(name)} asked for" for name in names
        )
        raise UserError(
            f"{folder} holds features of other settings ({listed}). Give the same settings to go "
            "on with them, or another --output."
        )


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
            UserError: if shards are missing, or not whole.
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
        UserError: if the folder is missing, or holds no videos.
        AnnotationError: if there is no subset of that name.
        UserError: if the manifest of shards is damaged.
    """
    folder = require(videos, what="The videos", option="--videos")
    manifest = read_manifest(folder)
    files = {} if manifest is not None else list_files(folder)
    if annotations is None:
        names = {Path(n).stem: uri for n, uri in files.items() if Path(n).suffix in EXTENSIONS}
        held = [v for file in manifest.shards for v in file.videos] if manifest else []
        if not names and not held:
            raise UserError(f"The videos: {folder} holds none of them. Correct --videos.")
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


_INTERVAL = 5.0  # seconds from line to line


class VideoInTheMaking:
    """Keeps the features of a video's units until all of them are there.

    Args:
        found: the video.
        sampled: how it is sampled.
        subset: of the annotations; empty without.
    """

    def __init__(self, found: FoundVideo, sampled: SampledVideo, subset: str) -> None:
        self.found, self.sampled, self._subset = found, sampled, subset
        self._stretches: dict[int, np.ndarray] = {}

    @property
    def entry(self) -> VideoEntry:
        """Where its features lie; their file is not known yet."""
        grid = self.sampled.grid
        return VideoEntry(
            file="",
            length=grid.num_features,
            fps=grid.fps,
            stride=grid.stride,
            offset=grid.offset,
            duration=self.found.duration,
        )

    @property
    def units_left(self) -> int:
        """Units whose features are not there yet."""
        return self.sampled.units - sum(len(units) for units in self._stretches.values())

    def seconds(self, units: int) -> float:
        """About how much of the video some of its units are.

        Args:
            units: their number.
        """
        return self.found.duration * units / self.sampled.units

    def take(self, number: int, units: np.ndarray) -> ExtractedVideo | None:
        """Takes the features of a stretch; returns those of the video once they are whole.

        Args:
            number: of the stretch, from 0 on.
            units: of shape (U, per_unit, C).
        """
        self._stretches[number] = units
        if self.units_left:
            return None
        whole = np.concatenate([units for _, units in sorted(self._stretches.items())])
        return ExtractedVideo(
            entry=self.entry,
            subset=self._subset,
            source=self.found.uri,
            features=self.sampled.joined(whole),
        )


class MakingProgress:
    """Prints how far a run is.

    Args:
        videos: all whose features are to be made.
    """

    def __init__(self, videos: Iterable[VideoInTheMaking]) -> None:
        videos = list(videos)
        self._videos, self._left = len(videos), sum(video.found.duration for video in videos)
        self._through, self._done = 0, 0.0
        self._began = self._shown = time.perf_counter()

    @property
    def speed(self) -> float:
        """Seconds of video per second so far."""
        return self._done / (time.perf_counter() - self._began)

    def made(self, seconds: float) -> None:
        """Counts what was made.

        Args:
            seconds: of video.
        """
        self._done += seconds
        self._left -= seconds

    def through(self, *, not_made: float = 0.0) -> None:
        """Counts a video that is through.

        Args:
            not_made: seconds of it of which there will be no features, as it failed.
        """
        self._through += 1
        self._left -= not_made
        if time.perf_counter() - self._shown > _INTERVAL or self._through == self._videos:
            self._shown = time.perf_counter()
            speed = self.speed
            left = f"  {duration(max(0.0, self._left) / speed)} left" if speed else ""
            print(
                f"video {self._through}/{self._videos}  {speed:.1f} s of video per second{left}",
                flush=True,
            )
