import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.videos.timegrid import TimeGrid

grids = st.builds(
    lambda fps, stride, features, offset: TimeGrid(
        fps=fps, stride=stride, length=stride * features, offset=offset
    ),
    fps=st.floats(0.1, 240),
    stride=st.integers(1, 64),
    features=st.integers(1, 300),
    offset=st.floats(0, 36000),
)
seconds = st.floats(-100, 40000)


@given(grid=grids, second=seconds)
@settings(deadline=None)
def test_seconds_and_features_undo_each_other(grid: TimeGrid, second: float) -> None:
    assert grid.to_seconds(grid.to_features(second)) == pytest.approx(second, abs=1e-6)
    assert grid.to_features(grid.to_seconds(second)) == pytest.approx(second, abs=1e-5)


@given(grid=grids)
@settings(deadline=None)
def test_a_feature_sits_at_the_mean_of_its_frames(grid: TimeGrid) -> None:
    centres = grid.frame_times().reshape(grid.num_features, grid.stride).mean(axis=1)
    np.testing.assert_allclose(
        grid.to_seconds(np.arange(grid.num_features, dtype=np.float64)), centres, rtol=1e-9
    )


@given(grid=grids)
@settings(deadline=None)
def test_the_window_spans_its_features_and_half_a_unit_more_at_each_side(grid: TimeGrid) -> None:
    assert grid.to_features(grid.offset) == pytest.approx(-0.5)
    assert grid.to_features(grid.end) == pytest.approx(grid.num_features - 0.5, abs=1e-6)
    assert grid.end - grid.offset == pytest.approx(grid.duration)


@given(grid=grids)
@settings(deadline=None)
def test_frames_are_sampled_at_their_middles(grid: TimeGrid) -> None:
    times = grid.frame_times()
    assert times.shape == (grid.length,)
    assert times.dtype == np.float64
    for i in {0, grid.length // 2, grid.length - 1}:
        begin, end = grid.offset + i / grid.fps, grid.offset + (i + 1) / grid.fps
        assert begin < times[i] < end
        assert times[i] == pytest.approx((begin + end) / 2)


@given(grid=grids, second=seconds)
@settings(deadline=None)
def test_frames_before_counts_the_middles(grid: TimeGrid, second: float) -> None:
    times = grid.frame_times()
    slack = 2e-6 / grid.fps + 1e-9
    low, high = np.count_nonzero(times < second - slack), np.count_nonzero(times < second + slack)
    assert low <= grid.frames_before(second) <= high


@given(grid=grids)
@settings(deadline=None)
def test_a_video_that_ends_with_the_window_fills_it(grid: TimeGrid) -> None:
    assert grid.frames_before(grid.end) == grid.length
    assert grid.frames_before(grid.offset) == 0


def test_values_worked_out_by_hand() -> None:
    grid = TimeGrid(fps=10.0, stride=4, length=8, offset=2.0)
    np.testing.assert_allclose(grid.frame_times(), [2.05, 2.15, 2.25, 2.35, 2.45, 2.55, 2.65, 2.75])
    assert grid.to_features(2.2) == pytest.approx(0.0)  # the middle of frames 0 to 3
    assert grid.to_features(2.6) == pytest.approx(1.0)
    assert grid.to_seconds(0.5) == pytest.approx(2.4)
    assert [grid.frames_before(s) for s in (1.0, 2.04, 2.06, 2.4, 9.0)] == [0, 0, 1, 4, 8]


@pytest.mark.parametrize(
    "values",
    [3.25, np.array([[0.0, 1.5], [2.0, 7.0]]), torch.tensor([[0.0, 1.5]], dtype=torch.float32)],
    ids=["float", "array", "tensor"],
)
def test_the_type_that_comes_in_goes_out(values: float) -> None:
    grid = TimeGrid(fps=7.5, stride=2, length=4, offset=1.0)
    for out in (grid.to_features(values), grid.to_seconds(values)):
        assert type(out) is type(values)
        assert getattr(out, "dtype", None) == getattr(values, "dtype", None)
        assert getattr(out, "shape", None) == getattr(values, "shape", None)


@pytest.mark.parametrize(
    "change",
    [
        {"fps": 0.0},
        {"fps": math.nan},
        {"fps": math.inf},
        {"stride": 0},
        {"length": 0},
        {"length": 7},
        {"offset": math.nan},
    ],
)
def test_impossible_grids_are_refused(change: dict[str, float]) -> None:
    fields = {"fps": 10.0, "stride": 2, "length": 8, "offset": 0.0} | change
    with pytest.raises(ValueError, match=f"TimeGrid.{next(iter(change))} must be"):
        TimeGrid(**fields)  # type: ignore[arg-type]
