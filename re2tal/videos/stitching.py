"""Video self-stitching: a clip and its magnified copy one after the other in a window.

Short actions fill only a few features, and anchors rarely match them. VSGN (Zhao, Thabet, Ghanem,
ICCV 2021, section 3.2) therefore shows a short clip twice: unchanged, and, after a gap, stretched
over the rest of the window. The action lasts longer in the copy, and both are ground truth. On
features, the copy is an interpolation. On videos, the copy samples frames more densely, so it
contains frames from between those of the clip.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from re2tal.annotations import Instance
from re2tal.videos.timegrid import TimeGrid


@dataclass(frozen=True, kw_only=True, slots=True)
class StitchConfig:
    """Settings of stitching; the shares are those published for THUMOS-14.

    Attributes:
        enabled: switch for all stitching.
        short: clips and short videos that fill at most this share of a window are stitched.
        clip: length of the clips around short actions in training, as a share of a window.
        gap: length of the gap between a clip and its copy, as a share of a window; at least one
            feature.

    Raises:
        ValueError: a field is out of its range.
    """

    enabled: bool = False
    short: float = 0.4
    clip: float = 0.38
    gap: float = 30 / 1280

    def __post_init__(self) -> None:
        if not 0 < self.clip <= self.short < 0.5:
            raise ValueError(
                f"StitchConfig needs 0 < clip <= short < 0.5, but clip is {self.clip} and short "
                f"is {self.short}: clips must be short enough to be stitched."
            )
        if not 0 <= self.gap < 1 - 2 * self.short:
            raise ValueError(
                f"StitchConfig.gap must be in [0, 1 - 2 x short), not {self.gap}: "
                "the copy would not be larger than the clip."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """Magnified copy of a clip in a stitched window.

    Attributes:
        grid: grid of the whole window at the copy's rate; the copy is its last part.
        first: first frame of the copy, a multiple of the stride.
    """

    grid: TimeGrid
    first: int


def magnified(clip: TimeGrid, valid: int, config: StitchConfig) -> Copy | None:
    """Make the copy of a clip; None if the clip is too long or stitching is off.

    Args:
        clip: grid of the window.
        valid: number of frames of the clip, at the start of the window.
        config: settings of stitching.
    """
    if not config.enabled or valid > config.short * clip.length:
        return None
    features = math.ceil(valid / clip.stride)
    first = features + max(1, round(config.gap * clip.num_features))
    if clip.num_features - first <= features:
        return None  # rounding in a window of few features: the copy would not be larger
    frame = first * clip.stride
    fps = (clip.length - frame) / (valid / clip.fps)  # the clip's seconds fill the remaining frames
    # frame `frame` of the copy's grid shows the start of the clip
    return Copy(grid=replace(clip, fps=fps, offset=clip.offset - frame / fps), first=frame)


def clip_starts(
    instances: Sequence[Instance],
    duration: float,
    length: float,
    random: np.random.Generator,
) -> list[float]:
    """Place clips so that together they show every short action of a video; return their starts.

    Actions that fit into one clip share it. The number of clips depends on the video alone, their
    places on the generator.

    Args:
        instances: actions of the video; those longer than a clip are ignored.
        duration: duration of the video in seconds, at least `length`.
        length: length of a clip in seconds.
        random: generator that draws the places.
    """
    short = sorted((i.start, i.end) for i in instances if i.end - i.start <= length)
    groups: list[tuple[float, float]] = []
    # greedy by start: extend the last group while it fits into one clip
    for start, end in short:
        if groups and max(end, groups[-1][1]) - groups[-1][0] <= length:
            groups[-1] = groups[-1][0], max(end, groups[-1][1])
        else:
            groups.append((start, end))
    earliest = [max(0.0, end - length) for _, end in groups]
    latest = [min(start, duration - length) for start, _ in groups]
    # for a group as long as a clip, rounding may make the latest start precede the earliest
    return [random.uniform(low, max(low, high)) for low, high in zip(earliest, latest, strict=True)]
