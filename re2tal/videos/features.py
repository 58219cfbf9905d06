"""Precomputed features, interpolated at the times of a window's feature grid.

A `TimeGrid` describes the positions of features in a video: feature `j` belongs to the middle of
its span, second `offset + (j + 0.5) * stride / fps`. Features of clips of `frames` frames at
distances of `stride` frames lie on such a grid (`clip_grid`), and so do features of a video that
were resampled to a fixed number (`resampled_grid`).
"""

import numpy as np

from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import Window

# Positions this close to a feature, in features, get the feature without interpolation.
_ROUNDING = 1e-3


def clip_grid(*, fps: float, stride: int, frames: int, length: int) -> TimeGrid:
    """Make the grid of features of clips; each feature sits in the middle of its clip.

    ActionFormer describes its features this way: `feat_stride`, `num_frames`, `default_fps`.

    Args:
        fps: frames per second of the clips.
        stride: frames from the start of one clip to that of the next.
        frames: frames in a clip; the first clip starts with the video.
        length: number of features.

    Raises:
        ValueError: an argument is out of its range.
    """
    if frames < 1:
        raise ValueError(f"A clip has at least 1 frame, not {frames}.")
    offset = 0.5 * (frames - stride) / fps if fps > 0 else 0.0
    return TimeGrid(fps=fps, stride=stride, length=length * stride, offset=offset)


def resampled_grid(*, duration: float, length: int) -> TimeGrid:
    """Make a grid of `length` features that span a video of `duration` s, as for ActivityNet.

    Raises:
        ValueError: an argument is not positive.
    """
    if not duration > 0:
        raise ValueError(f"A video lasts longer than {duration} seconds: its duration is wrong.")
    return TimeGrid(fps=length / duration, stride=1, length=length)


def window_features(features: np.ndarray, grid: TimeGrid, window: Window) -> np.ndarray:
    """Interpolate the features of a window from those of its video.

    A window's feature at the position of a video's feature equals it. Elsewhere it is interpolated
    linearly between its two neighbours; before the first and after the last feature, that feature
    is repeated. This equals `torch.nn.functional.interpolate` ("linear", no aligned corners), with
    which ActionFormer and VSGN resample features. Padding and the gap of a stitched window are
    zero; the copy is interpolated more densely, as in VSGN.

    Args:
        features: features of the video, of shape (T, C), of any floating type.
        grid: grid of `features`; `num_features` is T.
        window: window to fill; its grid's stride is the frames per feature.

    Returns:
        float32 of shape (window.grid.num_features, C), a new array.

    Raises:
        ValueError: the number of features differs from the grid's.
    """
    if features.ndim != 2 or len(features) != grid.num_features or not len(features):
        raise ValueError(
            f"The features must be of shape ({grid.num_features}, C), as their grid says, not "
            f"{features.shape}."
        )
    shown: np.ndarray = window.mask().reshape(-1, window.grid.stride).max(axis=1)
    places = grid.to_features(feature_times(window)[shown])
    nearest = np.round(places)
    # rounding errors of times must not blend two features
    places = np.where(np.abs(places - nearest) < _ROUNDING, nearest, places)
    places = places.clip(0, len(features) - 1)
    before = np.floor(places).astype(np.int64)
    after = np.ceil(places).astype(np.int64)
    share = (places - before).astype(np.float32)[:, None]
    out = np.zeros((len(shown), features.shape[1]), np.float32)
    out[shown] = (1 - share) * features[before] + share * features[after]
    return out


def feature_times(window: Window) -> np.ndarray:
    """Compute the seconds of the video to which a window's features belong, float64 (T',).

    In the copy of a stitched window these are the times that it magnifies. In a reversed window
    they decrease.
    """
    places: np.ndarray = np.arange(window.grid.num_features)
    if window.backwards:
        places = window.valid / window.grid.stride - 1 - places
    times = window.grid.to_seconds(places)
    if window.copy is not None:
        copied = places * window.grid.stride >= window.copy.first
        times = np.where(copied, window.copy.grid.to_seconds(places), times)
    return times
