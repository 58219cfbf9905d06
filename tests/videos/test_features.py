"""Features of a window out of those of its video, against a slow definition of its own."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.annotations import VideoAnnotation
from re2tal.videos.features import (
    clip_grid,
    feature_times,
    resampled_grid,
    window_features,
)
from re2tal.videos.stitching import StitchConfig
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import Window, WindowConfig, reversed_window, sliding_windows


def windows_of(duration: float, config: WindowConfig, *, stride: int) -> list[Window]:
    video = VideoAnnotation(video_id="v", subset="", duration=duration)
    return sliding_windows(video, (), config, stride=stride)


def of_video(length: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(length, channels)).astype(np.float32)


def slowly(features: np.ndarray, grid: TimeGrid, window: Window) -> np.ndarray:
    """The definition, number by number, in seconds: no grid of the code under test is used."""
    out = np.zeros((window.grid.length // window.grid.stride, features.shape[1]))
    spacing = grid.stride / grid.fps
    centres = [grid.offset + (j + 0.5) * spacing for j in range(len(features))]
    for place in range(len(out)):
        frames = range(place * window.grid.stride, (place + 1) * window.grid.stride)
        first = math.inf if window.copy is None else window.copy.first
        if not any(frame < window.valid or frame >= first for frame in frames):
            continue
        source = window.grid if window.copy is None or frames[0] < first else window.copy.grid
        shown = [window.valid - 1 - f if window.backwards else f for f in frames]
        middle = np.mean([source.offset + (frame + 0.5) / source.fps for frame in shown])
        if middle <= centres[0]:
            out[place] = features[0]
        elif middle >= centres[-1]:
            out[place] = features[-1]
        else:
            after = next(j for j, centre in enumerate(centres) if centre > middle)
            share = (middle - centres[after - 1]) / spacing
            out[place] = (1 - share) * features[after - 1] + share * features[after]
    return out


@settings(max_examples=40, deadline=None)
@given(
    duration=st.floats(1.0, 40.0),
    fps=st.floats(2.0, 30.0),
    features_fps=st.floats(1.0, 30.0),
    features_stride=st.integers(1, 9),
    offset=st.floats(-1.0, 1.0),
    length=st.integers(1, 60),
    stride=st.sampled_from([1, 2, 4]),
    stitch=st.booleans(),
)
def test_they_are_those_of_the_definition(
    *,
    duration: float,
    fps: float,
    features_fps: float,
    features_stride: int,
    offset: float,
    length: int,
    stride: int,
    stitch: bool,
) -> None:
    grid = TimeGrid(
        fps=features_fps, stride=features_stride, length=length * features_stride, offset=offset
    )
    features = of_video(length)
    config = WindowConfig(frames=48, fps=fps, stitch=StitchConfig(enabled=stitch))
    windows = windows_of(duration, config, stride=stride)[:3]
    backwards = [reversed_window(window) for window in windows if window.copy is None]
    for window in windows + backwards:
        found = window_features(features, grid, window)
        assert found.dtype == np.float32
        assert found.shape == (48 // stride, 3)
        # a thousandth of a feature is rounding: it may move a value by as much of a difference
        assert np.abs(found - slowly(features, grid, window)).max() < 1.1e-3 * 8


@settings(max_examples=40, deadline=None)
@given(duration=st.floats(0.5, 300.0), fps=st.sampled_from([7.5, 12.0, 29.97, 30.0]))
def test_features_on_the_same_grid_come_back_unchanged(duration: float, fps: float) -> None:
    config = WindowConfig(frames=64, fps=fps, overlap=0.5)
    step = config.grid(duration, stride=4).duration / 2
    length = math.ceil(duration * fps / 4) + 16
    features = of_video(length)
    grid = TimeGrid(fps=fps, stride=4, length=4 * length)
    for window in windows_of(duration, config, stride=4):
        on_grid = round(window.grid.offset / step)
        aligned = replace(window, grid=replace(window.grid, offset=on_grid * step))
        found = window_features(features, grid, aligned)
        shown = aligned.mask().reshape(-1, 4).any(axis=1)
        first = on_grid * 8
        assert np.array_equal(found[shown], features[first : first + 16][shown])
        assert not found[~shown].any()


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 40), wanted=st.integers(1, 40), duration=st.floats(0.5, 500.0))
def test_resampling_a_video_is_what_torch_does(length: int, wanted: int, duration: float) -> None:
    features = of_video(length)
    config = WindowConfig(frames=2 * wanted, fps=None)
    (window,) = windows_of(duration, config, stride=2)
    found = window_features(features, resampled_grid(duration=duration, length=length), window)
    expected = F.interpolate(
        torch.from_numpy(features.T.copy())[None], size=wanted, mode="linear", align_corners=False
    )
    assert np.abs(found - expected[0].numpy().T).max() < 1.1e-3 * 8


@settings(max_examples=40, deadline=None)
@given(
    fps=st.floats(1.0, 60.0),
    stride=st.integers(1, 32),
    frames=st.integers(1, 64),
    seconds=st.floats(0.0, 1000.0),
)
def test_clips_lie_where_actionformer_puts_them(
    fps: float, stride: int, frames: int, seconds: float
) -> None:
    grid = clip_grid(fps=fps, stride=stride, frames=frames, length=5)
    assert grid.num_features == 5
    theirs = (seconds * fps - 0.5 * frames) / stride  # a time in units of their features
    assert grid.to_features(seconds) == pytest.approx(theirs, abs=1e-6)


def test_half_precision_is_read_as_it_is() -> None:
    features = of_video(8).astype(np.float16)
    (window,) = windows_of(4.0, WindowConfig(frames=16, fps=4.0), stride=2)
    grid = TimeGrid(fps=4.0, stride=2, length=16)
    assert np.array_equal(window_features(features, grid, window), features.astype(np.float32))


def test_the_times_in_a_copy_are_those_of_the_clip() -> None:
    config = WindowConfig(frames=64, fps=8.0, stitch=StitchConfig(enabled=True))
    (window,) = windows_of(2.0, config, stride=2)
    assert window.copy is not None
    times = feature_times(window)
    assert (times[: window.valid // 2] < 2.0).all()
    copied = times[window.copy.first // 2 :]
    assert 0 < copied[0] < copied[-1] < 2.0
    assert copied[1] - copied[0] < (times[1] - times[0]) / 2


@pytest.mark.parametrize("shape", [(5, 3), (3,), (4, 2, 2)])
def test_features_that_are_not_those_of_the_grid_are_refused(shape: tuple[int, ...]) -> None:
    (window,) = windows_of(4.0, WindowConfig(frames=16, fps=4.0), stride=2)
    with pytest.raises(ValueError, match=r"must be of shape \(4, C\)"):
        window_features(np.zeros(shape), TimeGrid(fps=2.0, stride=2, length=8), window)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 frame, not 0"):
        clip_grid(fps=30.0, stride=4, frames=0, length=3)
    with pytest.raises(ValueError, match=r"TimeGrid.fps must be a positive number"):
        clip_grid(fps=0.0, stride=4, frames=16, length=3)
    with pytest.raises(ValueError, match=r"lasts longer than 0.0 seconds"):
        resampled_grid(duration=0.0, length=3)
