"""A folder that is being filled with features, video by video; a killed run goes on with it."""

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import av
import numpy as np

from pipelines.features.files import (
    ExtractedVideo,
    read_contents,
    read_rows,
    write_npy,
    write_parquet,
)
from pipelines.features.layout import (
    FOLDER,
    NAME,
    Description,
    FeatureError,
    FeatureType,
    Layout,
    VideoEntry,
    in_actionformers_words,
    read_description,
    write_description,
)
from pipelines.features.sampling import Sampling
from pipelines.storage import PARTIAL, file_sizes, join, remove

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
        FeatureError: if the folder holds features of other settings, or damaged ones.
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
                raise FeatureError(
                    f"{self._uri} holds features as {there.layout} files with the prefix "
                    f"{there.prefix!r}. Give the same to go on with them, or another --output."
                )
            if there.layout == "npy":
                self._entries = {k: v for k, v in there.videos.items() if v.file in names}
            self._failures = {k: v for k, v in there.failures.items() if k in self._of}
        elif any(name.endswith(".npy") for name in names):
            raise FeatureError(
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
        raise FeatureError(
            f"{folder} holds features of other settings ({listed}). Give the same settings to go "
            "on with them, or another --output."
        )
