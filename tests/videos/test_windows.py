import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.annotations import Instance, VideoAnnotation
from re2tal.videos.decoding import VideoError, decode
from re2tal.videos.stitching import StitchConfig
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import (
    Window,
    WindowConfig,
    at_speed,
    decode_window,
    reversed_window,
    sliding_windows,
    training_windows,
)
from tests.videos.made_videos import FPS, make_video, numbers

CLASSES = ("jump", "run")
STRIDE = 4


def annotated(duration: float, *segments: Sequence[float], label: str = "run") -> VideoAnnotation:
    return VideoAnnotation(
        video_id="v",
        subset="training",
        duration=duration,
        instances=tuple(Instance(start=s, end=e, label=label) for s, e in segments),
    )


def ten_seconds(*, overlap: float = 0.0, min_visible: float = 0.75) -> WindowConfig:
    """Windows of 10 seconds."""
    return WindowConfig(frames=80, fps=8.0, overlap=overlap, min_visible=min_visible)


def seconds(window: Window) -> np.ndarray:
    """The window's segments in seconds, worked out here again: (N, 2)."""
    grid = window.grid
    middle_of_first = grid.offset + grid.stride / grid.fps / 2
    return middle_of_first + window.segments.astype(np.float64) * grid.stride / grid.fps


durations = st.floats(0.3, 120)
configs = st.builds(
    lambda features, fps, overlap: WindowConfig(
        frames=features * STRIDE, fps=fps, overlap=overlap, min_visible=0.75
    ),
    features=st.integers(1, 40),
    fps=st.floats(1, 30),
    overlap=st.floats(0, 0.9),
)


def assert_covers(windows: list[Window], duration: float) -> None:
    """Every moment of the video lies in a window, and every window in the video."""
    half_frame = 0.5 / windows[0].grid.fps
    reached = 0.0
    for window in windows:
        assert window.grid.offset >= 0
        assert window.grid.offset <= reached + 1e-6
        reached = window.grid.end
        shown = np.count_nonzero(window.grid.frame_times() < duration)
        assert window.valid == pytest.approx(max(1, shown), abs=1e-9)
    assert reached >= duration - half_frame - 1e-6
    if len(windows) > 1:
        assert reached == pytest.approx(duration)
        assert all(window.valid == window.grid.length for window in windows)


@given(duration=durations, config=configs)
@settings(deadline=None)
def test_sliding_windows_cover_the_video(duration: float, config: WindowConfig) -> None:
    windows = sliding_windows(annotated(duration), CLASSES, config, stride=STRIDE)
    assert_covers(windows, duration)
    offsets = [window.grid.offset for window in windows]
    step = windows[0].grid.duration * (1 - config.overlap)
    np.testing.assert_allclose(offsets[:-1], np.arange(len(offsets) - 1) * step)
    if len(offsets) > 1:
        assert 0 < offsets[-1] - offsets[-2] <= step + 1e-6


@given(duration=durations, config=configs, seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_training_windows_cover_the_video(duration: float, config: WindowConfig, seed: int) -> None:
    video = annotated(duration)
    one, other = (
        training_windows(
            video, CLASSES, config, stride=STRIDE, random=np.random.default_rng(number)
        )
        for number in (seed, seed + 1)
    )
    assert_covers(one, duration)
    assert len(one) == len(other)
    # about as many as needed: a step apart, and one at each end
    grid = one[0].grid
    needed = (duration - grid.duration) / (grid.duration * (1 - config.overlap))
    assert len(one) <= max(1.0, needed + 2.5)


def test_training_windows_follow_their_generator() -> None:
    def offsets(seed: int) -> list[float]:
        random = np.random.default_rng(seed)
        windows = training_windows(
            annotated(47.0), CLASSES, ten_seconds(), stride=STRIDE, random=random
        )
        return [window.grid.offset for window in windows]

    assert offsets(1) == offsets(1)
    assert offsets(1) != offsets(2)
    np.testing.assert_allclose(np.diff(offsets(1))[1:-1], 10.0)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("duration", [10.2, 14.0, 15.0, 20.0, 25.1, 30.0, 47.0, 130.0])
def test_every_instance_is_seen_whole_in_some_epoch(duration: float, overlap: float) -> None:
    length = 0.9 * 10 * (1 + overlap) / 2
    starts = np.linspace(0, duration - length, 60)
    video = annotated(duration)
    random = np.random.default_rng(0)
    seen = np.zeros(len(starts), bool)
    for _ in range(80):
        for window in training_windows(
            video, CLASSES, ten_seconds(overlap=overlap), stride=STRIDE, random=random
        ):
            inside = (starts >= window.grid.offset) & (starts + length <= window.grid.end)
            seen |= inside
    assert seen.all()


@pytest.mark.parametrize("duration", [0.01, 3.0, 9.99, 10.0, 10.06])
def test_a_video_no_longer_than_a_window_gives_one(duration: float) -> None:
    video = annotated(duration, (0.0, duration))
    random = np.random.default_rng(0)
    (training,) = training_windows(video, CLASSES, ten_seconds(), stride=STRIDE, random=random)
    (sliding,) = sliding_windows(video, CLASSES, ten_seconds(), stride=STRIDE)
    for window in (training, sliding):
        assert window.grid == TimeGrid(fps=8.0, stride=STRIDE, length=80)
        assert window.valid == max(1, min(80, math.ceil(duration * 8 - 0.5)))
        np.testing.assert_allclose(seconds(window), [[0.0, min(duration, 10.0)]], atol=1e-5)


def test_segments_are_in_units_of_the_feature_grid() -> None:
    video = annotated(40.0, (11.0, 13.0), (24.0, 27.5))
    windows = sliding_windows(video, CLASSES, ten_seconds(), stride=STRIDE)
    assert [window.grid.offset for window in windows] == [0, 10, 20, 30]
    # two features a second; feature j is made from the half second around 0.25 + j / 2
    np.testing.assert_allclose(windows[1].segments, [[1.5, 5.5]])
    np.testing.assert_allclose(windows[2].segments, [[7.5, 14.5]])
    for window in windows:
        assert window.segments.dtype == np.float32
        assert window.segments.shape == (len(window.labels), 2)
        assert window.labels.dtype == np.int64


def test_videos_are_searched_with_an_overlap_of_its_own() -> None:
    config = WindowConfig(frames=80, fps=8.0, overlap=0.0, sliding_overlap=0.5)
    windows = sliding_windows(annotated(30.0), CLASSES, config, stride=STRIDE)
    assert [window.grid.offset for window in windows] == [0, 5, 10, 15, 20]
    random = np.random.default_rng(0)
    assert len(training_windows(annotated(30.0), CLASSES, config, stride=STRIDE, random=random)) < 5


def test_labels_are_places_among_the_classes() -> None:
    video = annotated(10.0, (1, 2), label="jump")
    (window,) = sliding_windows(video, CLASSES, ten_seconds(), stride=STRIDE)
    assert window.labels.tolist() == [0]
    (window,) = sliding_windows(video, ("a", "b", "jump"), ten_seconds(), stride=STRIDE)
    assert window.labels.tolist() == [2]


@pytest.mark.parametrize(
    ("segment", "first", "second"),
    [
        ((2.0, 6.0), [[2, 6]], []),
        ((7.0, 11.0), [[7, 10]], []),  # three quarters in the first window
        ((7.1, 11.1), [], []),  # a little less
        ((9.0, 13.0), [], [[10, 13]]),
        ((8.0, 12.0), [], []),  # half in each
        ((10.0, 14.0), [], [[10, 14]]),
        # longer than a window: three quarters of the window count
        ((2.5, 90.0), [[2.5, 10]], [[10, 20]]),
        ((2.6, 90.0), [], [[10, 20]]),
        ((0.0, 17.4), [[0, 10]], []),
        ((0.0, 17.5), [[0, 10]], [[10, 17.5]]),
    ],
)
def test_cut_instances_are_kept_when_enough_is_visible(
    segment: tuple[float, float], first: list[list[float]], second: list[list[float]]
) -> None:
    windows = sliding_windows(annotated(100.0, segment), CLASSES, ten_seconds(), stride=STRIDE)
    for window, expected in zip(windows[:2], (first, second), strict=True):
        np.testing.assert_allclose(seconds(window), np.array(expected).reshape(-1, 2), atol=1e-5)


@given(
    duration=durations,
    config=configs,
    shares=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=6),
)
@settings(deadline=None)
def test_kept_segments_lie_inside_their_window_and_their_instance(
    duration: float, config: WindowConfig, shares: list[tuple[float, float]]
) -> None:
    segments = [(min(a, b) * duration, max(a, b) * duration) for a, b in shares if a != b]
    video = annotated(duration, *segments)
    for window in sliding_windows(video, CLASSES, config, stride=STRIDE):
        assert (window.segments >= -0.5 - 1e-3).all()
        assert (window.segments <= window.grid.num_features - 0.5 + 1e-3).all()
        for start, end in seconds(window):
            assert any(s - 1e-3 <= start <= end <= e + 1e-3 for s, e in segments)


@pytest.mark.parametrize("duration", [3.0, 200.0])
def test_without_a_rate_the_whole_video_is_one_window(duration: float) -> None:
    config = WindowConfig(frames=96, fps=None)
    video = annotated(duration, (0.25 * duration, 0.5 * duration))
    random = np.random.default_rng(0)
    (training,) = training_windows(video, CLASSES, config, stride=STRIDE, random=random)
    (sliding,) = sliding_windows(video, CLASSES, config, stride=STRIDE)
    for window in (training, sliding):
        assert window.grid.duration == pytest.approx(duration)
        assert window.valid == 96
        np.testing.assert_allclose(window.segments, [[5.5, 11.5]], atol=1e-5)


def test_windows_travel_between_processes() -> None:
    video = annotated(40.0, (11.0, 13.0))
    for window in sliding_windows(video, CLASSES, ten_seconds(), stride=STRIDE):
        copy = pickle.loads(pickle.dumps(window))
        assert (copy.video_id, copy.grid, copy.valid) == (
            window.video_id,
            window.grid,
            window.valid,
        )
        np.testing.assert_array_equal(copy.segments, window.segments)
        np.testing.assert_array_equal(copy.labels, window.labels)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frames", 0),
        ("fps", 0.0),
        ("fps", math.nan),
        ("overlap", 1.0),
        ("overlap", -0.1),
        ("sliding_overlap", 1.0),
        ("min_visible", 0.0),
        ("min_visible", 1.1),
    ],
)
def test_impossible_settings_are_refused(field: str, value: float) -> None:
    fields = {"frames": 8, "fps": 4.0, field: value}
    with pytest.raises(ValueError, match=f"WindowConfig.{field} must be"):
        WindowConfig(**fields)  # type: ignore[arg-type]


def test_frames_that_do_not_fill_the_stride_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the stride"):
        sliding_windows(annotated(3.0), CLASSES, WindowConfig(frames=6, fps=4.0), stride=STRIDE)


@pytest.fixture(scope="module")
def video_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("windows") / "v.mp4", 120)


def test_a_window_alone_is_the_same_as_cut_from_the_whole_video(video_file: Path) -> None:
    every_frame = (np.arange(120) + 0.5) / FPS
    whole = decode(video_file, every_frame, size=32)
    config = WindowConfig(frames=40, fps=FPS, overlap=0.3)
    windows = sliding_windows(annotated(120 / FPS), CLASSES, config, stride=STRIDE)
    assert len(windows) == 4
    for window in windows:
        first = round(window.grid.offset * FPS)
        frames = decode_window(video_file, window, size=32)
        np.testing.assert_array_equal(frames, whole[first : first + 40])


def test_frames_of_a_window_are_those_in_the_middle_of_its_steps(video_file: Path) -> None:
    grid = TimeGrid(fps=5.0, stride=1, length=6, offset=1.0)
    window = Window(
        video_id="v",
        grid=grid,
        valid=6,
        segments=np.zeros((0, 2), np.float32),
        labels=np.zeros(0, np.int64),
    )
    frames = decode_window(video_file, window, size=None)
    np.testing.assert_array_equal(numbers(frames), [27, 32, 37, 42, 47, 52])


def test_padding_is_black_and_frames_before_it_are_not(video_file: Path) -> None:
    config = WindowConfig(frames=160, fps=FPS)
    (window,) = sliding_windows(annotated(120 / FPS), CLASSES, config, stride=STRIDE)
    frames = decode_window(video_file, window, size=32)
    assert frames.shape == (160, 32, 48, 3)
    assert window.valid == 120
    assert (frames[120:] == 0).all()
    assert (frames[:120].reshape(120, -1).max(axis=1) > 0).all()
    np.testing.assert_array_equal(numbers(frames[:120]), np.arange(120))


# Other speeds, and backwards.


def slowly(
    window: Window, video: VideoAnnotation, speed: float, share: float, *, backwards: bool
) -> tuple[list[float], list[tuple[float, float]]]:
    """Seconds of the frames, one after another, and segments in features, all by hand."""
    frames, fps, stride = window.grid.length, window.grid.fps / speed, window.grid.stride
    shown = min(window.grid.end, video.duration) - window.grid.offset
    start = window.grid.offset + share * (shown - frames / fps)
    start = max(min(start, video.duration - frames / fps), 0.0)
    times = []
    for frame in range(frames):
        middle = start + frame / fps + 0.5 / fps
        if middle < video.duration - 1e-7:
            times.append(middle)
    if not times:
        times = [start + 0.5 / fps]
    end, segments = min(start + frames / fps, video.duration), []
    for instance in video.instances:
        first, last = max(instance.start, start), min(instance.end, end)
        if last - first >= 0.75 * min(instance.end - instance.start, frames / fps) - 1e-9:
            in_frames = [(first - start) * fps, (last - start) * fps]
            if backwards:
                in_frames = [len(times) - in_frames[1], len(times) - in_frames[0]]
            segments.append((in_frames[0] / stride - 0.5, in_frames[1] / stride - 0.5))
    return times[::-1] if backwards else times, segments


@given(
    duration=st.floats(1.0, 60.0),
    config=configs,
    speed=st.floats(0.25, 4.0),
    share=st.floats(0.0, 1.0),
    backwards=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_windows_at_another_speed_are_those_of_a_slow_definition(
    duration: float, config: WindowConfig, speed: float, share: float, backwards: bool, seed: int
) -> None:
    ends = np.sort(np.random.default_rng(seed).uniform(0, duration, (4, 2))).tolist()
    video = annotated(duration, *ends)
    random = np.random.default_rng(seed)
    for window in training_windows(video, CLASSES, config, stride=STRIDE, random=random):
        changed = at_speed(window, video, CLASSES, config, speed=speed, share=share)
        if backwards:
            changed = reversed_window(changed)
        times, segments = slowly(window, video, speed, share, backwards=backwards)
        np.testing.assert_allclose(changed.frame_times(), times, rtol=1e-9, atol=1e-6)
        assert changed.valid == len(times)
        assert changed.mask().tolist() == [i < len(times) for i in range(config.frames)]
        expected = np.clip(np.array(segments).reshape(-1, 2), -0.5, None)
        np.testing.assert_allclose(changed.segments, expected, atol=1e-4)
        assert len(changed.labels) == len(segments)
        # nothing outside the video is asked for, and no more moments than the longer one shows
        half = 0.5 / changed.grid.fps
        assert min(times) >= 0
        assert max(times) <= max(duration, half)
        if speed < 1:
            assert changed.grid.offset >= window.grid.offset - 1e-9
            assert min(changed.grid.end, duration) <= window.grid.end + 1e-9


def test_a_window_at_speed_1_is_the_same_and_one_twice_reversed_too() -> None:
    video = annotated(23.0, (1.0, 3.3), (8.0, 15.2), (21.9, 23.0))
    config = ten_seconds(overlap=0.25)
    random = np.random.default_rng(0)
    for window in training_windows(video, CLASSES, config, stride=STRIDE, random=random):
        assert at_speed(window, video, CLASSES, config, speed=1.0, share=0.3) is window
        back = reversed_window(window)
        # the grid's numbers are exact in float32, so that mirroring adds one rounding
        mirrored = (window.grid.num_features - 1) - window.segments[:, ::-1]
        np.testing.assert_array_equal(back.segments, mirrored)
        again = reversed_window(back)
        assert (again.grid, again.backwards) == (window.grid, False)
        np.testing.assert_allclose(again.segments, window.segments, atol=1e-6)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("frames", "speed", "first", "expected"),
    [
        (20, 2.0, 0.0, range(1, 41, 2)),
        (20, 0.5, 1.0, [frame for frame in range(25, 35) for _ in range(2)]),
        (100, 2.0, 0.0, range(1, 121, 2)),  # the last 40 are padding
    ],
)
def test_frames_at_another_speed_are_decoded_one_after_another(
    video_file: Path, frames: int, speed: float, first: float, expected: Sequence[int], *,
    backwards: bool,
) -> None:  # fmt: skip
    video = annotated(120 / FPS)
    config = WindowConfig(frames=frames, fps=FPS)
    grid = TimeGrid(fps=FPS, stride=STRIDE, length=frames, offset=first)
    nothing = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
    window = Window(video_id="v", grid=grid, valid=frames, segments=nothing[0], labels=nothing[1])
    window = at_speed(window, video, CLASSES, config, speed=speed, share=0.0)
    window = reversed_window(window) if backwards else window
    decoded = decode_window(video_file, window, size=None)
    shown = numbers(decoded[: len(expected)]).tolist()
    assert shown == (list(expected)[::-1] if backwards else list(expected))
    assert (decoded[len(expected) :] == 0).all()


def test_stitched_windows_keep_their_speed_and_order() -> None:
    video = annotated(30.0, (10.0, 10.5))
    config = replace(ten_seconds(), stitch=StitchConfig(enabled=True))
    random = np.random.default_rng(0)
    *_, stitched = training_windows(video, CLASSES, config, stride=STRIDE, random=random)
    assert stitched.copy is not None
    with pytest.raises(ValueError, match="two rates already"):
        at_speed(stitched, video, CLASSES, config, speed=2.0, share=0.5)
    with pytest.raises(ValueError, match="cannot be reversed"):
        reversed_window(stitched)


def test_a_window_behind_the_end_of_the_file_is_an_error(video_file: Path) -> None:
    (window,) = sliding_windows(
        annotated(30.0), CLASSES, WindowConfig(frames=120, fps=4.0), stride=STRIDE
    )
    with pytest.raises(VideoError, match=r"its last frame ends at 4\.80"):
        decode_window(video_file, window, size=32)
