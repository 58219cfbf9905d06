"""Frames of which features are made, against slow definitions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.sampling import SampledVideo, Sampling, SamplingConfig


def clips(**changes: object) -> Sampling:
    config = SamplingConfig(way="clips", **changes)  # type: ignore[arg-type]
    return config.resolved(temporal_stride=2, multiple=2)


def windows(stride: int = 2, **changes: object) -> Sampling:
    config = SamplingConfig(way="windows", **changes)  # type: ignore[arg-type]
    return config.resolved(temporal_stride=stride, multiple=stride)


@settings(max_examples=50, deadline=None)
@given(
    duration=st.floats(0.05, 100.0),
    fps=st.sampled_from([7.5, 12.0, 29.97]),
    frames=st.sampled_from([2, 8, 16]),
    stride=st.integers(1, 20),
)
def test_clips_are_all_that_lie_whole_in_the_video(
    duration: float, fps: float, frames: int, stride: int
) -> None:
    video = clips(fps=fps, frames=frames, stride=stride).of(duration=duration, own_fps=99.0)
    sampled = [k for k in range(5000) if (k + 0.5) / fps < duration - 1e-5 / fps]
    assert video.shown == max(1, len(sampled))
    expected = [k for k in sampled if k % stride == 0 and k + frames - 1 in sampled] or [0]
    assert video.starts().tolist() == expected
    # a feature belongs to the middle of its clip
    centres = [(start + frames / 2) / fps for start in expected]
    assert video.grid.to_seconds(np.arange(len(expected))) == pytest.approx(centres)


@settings(max_examples=50, deadline=None)
@given(
    duration=st.floats(0.05, 30.0),
    window=st.integers(1, 20),
    stride=st.sampled_from([1, 2, 4]),
    overlap=st.floats(0.0, 0.95),
)
def test_each_feature_comes_from_the_window_in_whose_middle_it_is(
    duration: float, window: int, stride: int, overlap: float
) -> None:
    sampling = windows(stride, fps=12.0, frames=window * stride, overlap=overlap)
    video = sampling.of(duration=duration, own_fps=99.0)
    length = math.ceil(video.shown / stride)
    assert (video.grid.num_features, video.grid.offset) == (length, 0.0)
    starts = video.starts()
    assert not (starts % stride).any()
    assert len(set(starts.tolist())) == len(starts)
    first = starts // stride
    assert first[-1] + window >= length
    assert first[-1] == 0 or first[-1] + window == length  # the last one ends with the video
    units = np.stack(np.meshgrid(first, np.arange(window), indexing="ij"), axis=-1)
    joined = video.joined(units.astype(np.float32))
    place = np.arange(length)
    assert np.array_equal(joined.sum(axis=1), place)  # of the frames to which it belongs
    away = np.abs(place[:, None] - (first + (window - 1) / 2))
    assert np.array_equal(np.abs(joined[:, 1] - (window - 1) / 2), away.min(axis=1))


@settings(max_examples=30, deadline=None)
@given(
    duration=st.floats(0.1, 60.0),
    size=st.sampled_from([8, 224, 512]),
    batch_size=st.integers(1, 5),
    way=st.sampled_from(["clips", "windows"]),
)
def test_stretches_hold_every_unit_once_in_whole_batches(
    duration: float, size: int, batch_size: int, way: str
) -> None:
    sampling = clips(fps=25.0) if way == "clips" else windows(fps=25.0, frames=128)
    video = sampling.of(duration=duration, own_fps=99.0)
    stretches = list(video.stretches(size=size, batch_size=batch_size))
    units = []
    for number, stretch in enumerate(stretches):
        grid = stretch.window.grid
        begin = round(grid.offset * 25)
        units += (begin + stretch.starts).tolist()
        assert stretch.starts[0] == 0
        assert grid.length == stretch.starts[-1] + video.frames
        assert stretch.window.valid == min(grid.length, video.shown - begin) >= 1
        # the same times as if the whole video were decoded at once
        assert grid.frame_times() == pytest.approx((begin + np.arange(grid.length) + 0.5) / 25)
        frames = grid.length * size * size * 3
        assert len(stretch.starts) <= batch_size or frames <= 64 * 2**20
        if number < len(stretches) - 1:
            assert len(stretch.starts) % batch_size == 0
    assert units == video.starts().tolist()


def test_a_window_may_be_the_whole_video() -> None:
    video = windows(4, fps="squeeze", frames=64).of(duration=31.7, own_fps=99.0)
    assert video.starts().tolist() == [0]
    assert video.grid.num_features == 16
    assert video.grid.duration == pytest.approx(31.7)


def test_the_rate_may_be_the_videos_own() -> None:
    video = clips().of(duration=2.0, own_fps=25.0)
    assert (video.grid.fps, video.grid.stride, video.frames, video.shown) == (25.0, 4, 16, 50)
    assert isinstance(video, SampledVideo)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fps": 0.0}, "--fps must be a positive number, own or squeeze, not 0.0"),
        ({"fps": "squeeze"}, "--fps squeeze goes with --way windows"),
        ({"frames": 0}, "--frames must be at least 1, not 0"),
        ({"stride": -1}, "--stride must be at least 1, not -1"),
        ({"overlap": 1.0}, r"--overlap must be in \[0, 1\), not 1.0"),
        ({"frames": 15}, "--frames must be a multiple of 2, .* not 15"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        clips(**changes)
