"""Reading features, whichever program made them: for training on them instead of on frames."""

from collections.abc import Iterable, Mapping

import numpy as np

from pipelines.features.files import read_array, read_rows
from pipelines.features.layout import HOW_TO_SAY, NAME, FeatureError, Layout, read_description
from pipelines.storage import absolute, file_sizes, join
from re2tal.videos.features import window_features
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import Window

# Features may end so long before or after their video, as a share of it or in seconds, before it
# is a disagreement: clips end early, and files and annotations do not last equally long.
_SHARE, _SECONDS = 0.1, 5.0
# Where the places of features follow from a rule that somebody wrote down, a larger share means
# that the rule is another folder's: half as many frames a second, or twice the stride.
_WRONG = 0.4


class Features:
    """A folder of features; plain data until a video is read, so that it can travel.

    Args:
        folder: path or URI of the folder, with `features.json` in it.

    Attributes:
        channels: C, of all videos.

    Raises:
        FeatureError: if it holds no features, or does not say where in their videos they lie.
    """

    def __init__(self, folder: str) -> None:
        self._folder = absolute(folder)
        self._said = read_description(self._folder)
        if self._said.state != "complete":
            raise FeatureError(
                f"{self._folder} is not complete. Give the command with extract_features.py that "
                "made it again: it goes on."
            )
        if not self._said.says_where:
            raise FeatureError(
                f"{join(self._folder, NAME)} does not say where in their videos the features lie, "
                f"or there are none: {HOW_TO_SAY}."
            )
        self._files = self._find_files()
        self.channels = self._said.channels or self._measured()

    @property
    def layout(self) -> Layout:
        """Of the files."""
        return self._said.layout

    @property
    def video_ids(self) -> tuple[str, ...]:
        """The videos that have features, sorted."""
        return tuple(sorted(self._files))

    def uri(self, video_id: str) -> str:
        """The path or URI of the file of a video's features.

        Args:
            video_id: one of `video_ids`.
        """
        return join(self._folder, self._files[video_id])

    def missing(self, video_ids: Iterable[str]) -> dict[str, str]:
        """Which of some videos have no features.

        Args:
            video_ids: the videos.

        Returns:
            Video id to why.
        """
        why = self._said.failures
        nothing = f"{self._folder} has no features of it"
        return {v: why.get(v, nothing) for v in video_ids if v not in self._files}

    def read(self, video_id: str, *, duration: float) -> tuple[np.ndarray, TimeGrid]:
        """The features of a video and where in it they lie.

        Args:
            video_id: the video.
            duration: of the video, in seconds.

        Returns:
            Floating numbers of shape (T, C), and their grid.

        Raises:
            FeatureError: if it has none, or they are damaged.
            OSError: if their file cannot be reached.
        """
        if video_id not in self._files:
            raise FeatureError(f"{video_id}: {self.missing([video_id])[video_id]}")
        uri = self.uri(video_id)
        if self._said.layout == "parquet":
            row = self._said.videos[video_id].row
            found = read_rows(uri, [row])
            if video_id not in found:
                raise FeatureError(f"{uri} has another video than {video_id} in row {row}.")
            features = found[video_id].features
        else:
            features = read_array(uri)
        if features.shape[1] != self.channels:
            raise FeatureError(
                f"{uri} has {features.shape[1]} channels where others have {self.channels}."
            )
        grid = self._said.grid(video_id, length=len(features), duration=duration)
        if grid.num_features != len(features):
            raise FeatureError(
                f"{uri} holds {len(features)} features of {video_id}, but {NAME} says that there "
                f"are {grid.num_features}."
            )
        if abs(grid.end - duration) > max(_SECONDS, _WRONG * duration):
            raise FeatureError(
                f"{uri} holds features up to second {grid.end:.1f} of a video of {duration:.1f} s, "
                f"if {NAME} is right: correct its fps and stride."
            )
        return features, grid

    def window(self, window: Window, *, duration: float) -> np.ndarray:
        """The features of a window; `re2tal.videos.features.window_features` says which.

        Args:
            window: which stretch of which video.
            duration: of the video, in seconds.

        Returns:
            float32 of shape (T', C).

        Raises:
            FeatureError: if there are none, or they are damaged.
            OSError: if their file cannot be reached.
        """
        features, grid = self.read(window.video_id, duration=duration)
        return window_features(features, grid, window)

    def disagreements(self, durations: Mapping[str, float]) -> dict[str, str]:
        """Videos whose features do not last about as long as they do, if that is known.

        Args:
            durations: video id to seconds, as annotated.

        Returns:
            Video id to what is wrong, in a sentence.
        """
        found = {}
        for video_id in sorted(durations.keys() & self._said.videos.keys()):
            ends, lasts = self._said.videos[video_id].grid.end, durations[video_id]
            if abs(ends - lasts) > max(_SECONDS, _SHARE * lasts):
                found[video_id] = (
                    f"{video_id}: its features end at second {ends:.1f}, but it lasts {lasts:.1f}"
                )
        return found

    def _find_files(self) -> dict[str, str]:
        """Video id to the name of its file."""
        said = self._said
        if said.clips is None and not said.resampled:
            return {video_id: entry.file for video_id, entry in said.videos.items()}
        names = [
            name
            for name in file_sizes(self._folder)
            if name.startswith(said.prefix) and name.endswith(said.ending)
        ]
        return {name[len(said.prefix) : len(name) - len(said.ending)]: name for name in names}

    def _measured(self) -> int:
        """The channels of a folder that does not say them: those of its first video."""
        if not self._files:
            raise FeatureError(
                f"{self._folder} holds no features: no file is named {self._said.prefix}"
                f"ID{self._said.ending}."
            )
        return int(read_array(join(self._folder, self._files[self.video_ids[0]])).shape[1])
