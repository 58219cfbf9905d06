"""Writing of a folder of features, video by video, so that a killed run can be continued."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import av
import numpy as np

from pipelines.core.storage import Stamp, file_sizes, join, remove
from pipelines.data.features import (
    FEATURES,
    FOLDER,
    NAME,
    Description,
    ExtractedVideo,
    FeatureType,
    Layout,
    VideoEntry,
    in_actionformers_words,
    read_row,
    write_npy,
    write_parquet,
)
from pipelines.data.sampling import SampledVideo, Sampling
from pipelines.data.store import NOTES, Refreshed, part
from re2tal.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesConfig:
    """Format of the files of features.

    Attributes:
        layout: "npy", one file a video, as ActionFormer reads them; "parquet", several videos in a
            file.
        prefix: start of the names of `.npy` files, before the video's id; `v_` is usual for
            ActivityNet.
        feature_type: float32, as published features are, or float16, half as large.
        videos_per_file: number of videos in a Parquet file.
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
    """Videos of one file: `waiting` for their features, and those already `made`."""

    video_ids: tuple[str, ...]
    waiting: set[str] = field(default_factory=set)
    made: dict[str, ExtractedVideo] = field(default_factory=dict)


class FeatureFolder:
    """Folder that collects features of videos, and writes a file once all its videos are finished.

    Args:
        uri: path or URI of the folder.
        config: format of the files.
        video_ids: ids of all videos.
        settings: settings that determine the features.
        sampling: units that each video is cut into.
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
        self.notes = join(uri, NOTES)
        # as they are read back from a file: tuples become lists in JSON
        self._settings = json.loads(json.dumps({**settings, "feature_type": config.feature_type}))
        self._all = tuple(sorted(video_ids))
        npy = config.layout == "npy"
        self._actionformer = in_actionformers_words(sampling, channels) if npy else {}
        self._channels = channels
        self._entries: dict[str, VideoEntry] = {}
        self._failures: dict[str, str] = {}
        self._parts = self._pack()
        self._of = {v: name for name, held in self._parts.items() for v in held.video_ids}
        self._description = Refreshed(
            lambda: FEATURES.write_description(self._uri, self.description)
        )
        self._read()

    @property
    def description(self) -> Description:
        """Content of the folder."""
        through = self._entries.keys() | self._failures.keys()
        return Description(
            state="complete" if through >= set(self._all) else "incomplete",
            layout=self._config.layout,
            prefix=self._config.prefix,
            channels=self._channels,
            actionformer=self._actionformer,
            settings=self._settings,
            software={"re2tal": version("re2tal"), "torch": version("torch"), "av": av.__version__},
            videos=dict(sorted(self._entries.items())),
            failures=dict(sorted(self._failures.items())),
        )

    def begin(self, *, retry_failed: bool) -> list[str]:
        """Remove a killed run's temporary files, and list the videos without features.

        With `retry_failed` the list includes the videos that failed before.
        """
        FEATURES.remove_leftovers(self._uri)
        if retry_failed:
            self._failures.clear()
        left = [v for v in self._all if v not in self._entries and v not in self._failures]
        for video_id in left:
            self._parts[self._of[video_id]].waiting.add(video_id)
        self.write_description()
        return left

    @property
    def stamps(self) -> dict[str, Stamp]:
        """Video id to the stamp of the file that its features were made of."""
        return {v: entry.source for v, entry in self._entries.items() if entry.source is not None}

    def forget(self, video_ids: Iterable[str]) -> None:
        """Drop the features of videos, so that they are made anew; call it before `begin`."""
        for video_id in video_ids:
            del self._entries[video_id]
            name = self._of[video_id]
            if self._config.layout == "npy":  # a stale file must not pass for the new video's
                remove(join(self._uri, name))
                self._names -= {name}

    def add(self, video_id: str, video: ExtractedVideo) -> None:
        """Add the features of a video, float32; if they are not finite, the video fails."""
        kind = self._config.feature_type
        with np.errstate(over="ignore"):  # float16 may overflow to inf, which is reported below
            features = video.features.astype(np.dtype(kind))
        if not np.isfinite(features).all():
            reason = f"its features are not finite (nan or inf) as {kind} numbers"
            self.fail(video_id, reason if kind == "float32" else f"{reason}: write float32")
            return
        self._parts[self._of[video_id]].made[video_id] = replace(video, features=features)
        self._through(video_id)

    def fail(self, video_id: str, reason: str) -> None:
        """Record that a video has no features, and why."""
        self._failures[video_id] = reason
        self._through(video_id)

    def holds(self, video_id: str) -> bool:
        """Tell whether a video's file exists, even if `features.json` does not list it yet."""
        return self._config.layout == "npy" and self._of[video_id] in self._names

    def adopt(self, video_id: str, entry: VideoEntry) -> None:
        """Adopt the existing file of a video; `entry` is the place of its features."""
        name = self._of[video_id]
        self._entries[video_id] = replace(entry, file=name)
        self._parts[name].waiting.discard(video_id)

    def write_description(self) -> None:
        """Write `features.json`."""
        self._description.refresh(now=True)

    def _through(self, video_id: str) -> None:
        name = self._of[video_id]
        held = self._parts[name]
        held.waiting.discard(video_id)
        if not held.waiting:
            self._write(name, held)
        self._description.refresh()

    def _write(self, name: str, held: _Part) -> None:
        """Write the file of a part, once all of its videos are finished."""
        if self._config.layout == "npy":
            for video_id, video in held.made.items():
                write_npy(join(self._uri, name), video.features)
                self._entries[video_id] = replace(video.entry, file=name)
        else:
            # a Parquet file cannot be extended: rows that it holds already are written again
            rows = [self._entries[v].row for v in held.video_ids if v in self._entries]
            contents = write_parquet(
                self._uri,
                name,
                dict(read_row(join(self._uri, name), row) for row in rows) | held.made,
                kind=self._config.feature_type,
                settings=self._settings,
                failures={v: self._failures[v] for v in held.video_ids if v in self._failures},
            )
            self._entries.update(contents.videos)
        held.made.clear()

    def _pack(self) -> dict[str, _Part]:
        """Assign videos to files by their ids alone."""
        if self._config.layout == "npy":
            return {f"{self._config.prefix}{v}.npy": _Part(video_ids=(v,)) for v in self._all}
        # all ids together determine a video's file: another list is another folder
        listed = hashlib.sha256("\n".join(self._all).encode()).hexdigest()
        step = self._config.videos_per_file
        self._settings |= {"videos": listed, "videos_per_file": step}
        return {
            join(FOLDER, part(first // step)): _Part(video_ids=self._all[first : first + step])
            for first in range(0, len(self._all), step)
        }

    def _read(self) -> None:
        """Read the entries and failures of an earlier run."""
        names = file_sizes(self._uri)
        self._names = frozenset(names)
        there = FEATURES.read_description(self._uri)
        if there is not None:
            FEATURES.require_equal(self._uri, self._settings, there.settings)
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
            for contents in FEATURES.read(self._uri, self._settings).values():
                self._entries.update(contents.videos)
                self._failures.update(contents.failures)


@dataclass(kw_only=True, slots=True)
class VideoInTheMaking:
    """Video whose features are collected until those of all its units have come.

    Attributes:
        uri: path or URI of the video.
        duration: seconds that the features cover.
        subset: name in the annotations; empty without annotations.
        stamp: signs by which its file is recognised.
    """

    uri: str
    duration: float
    sampled: SampledVideo
    subset: str
    stamp: Stamp | None = None
    _stretches: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def entry(self) -> VideoEntry:
        """Place of the video's features, without their file, which is not known yet."""
        grid = self.sampled.grid
        return VideoEntry(
            file="",
            length=grid.num_features,
            fps=grid.fps,
            stride=grid.stride,
            offset=grid.offset,
            duration=self.duration,
            source=self.stamp,
        )

    @property
    def units_left(self) -> int:
        """Number of units whose features have not come yet."""
        return self.sampled.units - sum(len(units) for units in self._stretches.values())

    def seconds(self, units: int) -> float:
        """Return the approximate length in seconds of a number of the video's units."""
        return self.duration * units / self.sampled.units

    def take(self, number: int, units: np.ndarray) -> ExtractedVideo | None:
        """Take a stretch's features (U, per_unit, C); return the whole video's with the last."""
        self._stretches[number] = units
        if self.units_left:
            return None
        whole = np.concatenate([units for _, units in sorted(self._stretches.items())])
        return ExtractedVideo(
            entry=self.entry,
            subset=self.subset,
            source=self.uri,
            features=self.sampled.joined(whole),
        )
