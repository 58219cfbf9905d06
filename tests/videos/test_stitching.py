import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.annotations import Instance, VideoAnnotation
from re2tal.videos.stitching import StitchConfig, clip_starts, magnified
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import (
    Window,
    WindowConfig,
    decode_window,
    sliding_windows,
    training_windows,
)
from tests.videos.made_videos import FPS, make_video, numbers

STRIDE = 2
STITCH = StitchConfig(enabled=True, gap=0.05)
CONFIG = WindowConfig(frames=80, fps=8.0, stitch=STITCH)  # 10 seconds, clips of 3.75


def annotated(duration: float, *segments: tuple[float, float]) -> VideoAnnotation:
    instances = tuple(Instance(start=s, end=e, label="run") for s, e in segments)
    return VideoAnnotation(video_id="v", subset="training", duration=duration, instances=instances)


def cut(video: VideoAnnotation, seed: int = 0, config: WindowConfig = CONFIG) -> list[Window]:
    random = np.random.default_rng(seed)
    return training_windows(video, ("run",), config, stride=STRIDE, random=random)


def test_the_copy_shows_the_clip_over_the_rest_of_the_window() -> None:
    clip = TimeGrid(fps=8.0, stride=2, length=80, offset=5.0)
    copy = magnified(clip, 30, StitchConfig(enabled=True, gap=0.1))
    assert copy is not None
    assert copy.first == 30 + 8  # the gap of 4 features
    times = copy.grid.frame_times()[copy.first :]
    step = (30 / 8) / 42  # 42 frames left for the clip's 30 / 8 seconds
    np.testing.assert_allclose(times, 5.0 + (np.arange(42) + 0.5) * step)


@given(
    features=st.integers(4, 80),
    stride=st.integers(1, 4),
    share=st.floats(0.01, 1),
    gap=st.floats(0, 0.19),
)
@settings(deadline=None)
def test_clip_gap_and_copy_fill_the_window(
    features: int, stride: int, share: float, gap: float
) -> None:
    clip = TimeGrid(fps=8.0, stride=stride, length=features * stride, offset=3.0)
    valid = max(1, int(share * clip.length))
    copy = magnified(clip, valid, StitchConfig(enabled=True, gap=gap))
    if valid > 0.4 * clip.length:
        assert copy is None
    if copy is None:
        return
    assert copy.first % stride == 0
    before = -(-valid // stride)
    assert copy.first // stride > before  # a feature at least between clip and copy
    assert features - copy.first // stride > before  # and the copy is larger
    np.testing.assert_allclose(copy.grid.end, clip.offset + valid / clip.fps)
    np.testing.assert_allclose(
        copy.grid.to_seconds(copy.first / stride - 0.5), clip.offset, atol=1e-9
    )


def test_short_videos_are_stitched_and_long_ones_are_not() -> None:
    (short,) = sliding_windows(annotated(3.0, (1.0, 2.0)), ("run",), CONFIG, stride=STRIDE)
    assert short.copy is not None
    assert short.valid == 24
    mask = short.mask()
    assert mask[:24].all()
    assert not mask[24 : short.copy.first].any()
    assert mask[short.copy.first :].all()
    assert len(short.frame_times()) == mask.sum()
    # both copies of the instance, the second one longer
    first, second = short.segments
    np.testing.assert_allclose(short.grid.to_seconds(first), [1.0, 2.0], atol=1e-5)
    np.testing.assert_allclose(short.copy.grid.to_seconds(second), [1.0, 2.0], atol=1e-5)
    assert second[1] - second[0] > 1.5 * (first[1] - first[0])
    assert short.labels.tolist() == [0, 0]
    for window in sliding_windows(annotated(25.0), ("run",), CONFIG, stride=STRIDE):
        assert window.copy is None
        assert window.mask().all()


def test_training_adds_clips_around_short_actions() -> None:
    video = annotated(40.0, (5.0, 6.0), (7.0, 8.5), (20.0, 26.0), (30.0, 31.0))
    plain = cut(video, config=dataclasses.replace(CONFIG, stitch=StitchConfig()))
    windows = cut(video)
    clips = windows[len(plain) :]
    assert all(window.copy is None for window in windows[: len(plain)])
    assert len(clips) == 2  # two actions share the first; the long one has none
    assert all(clip.copy is not None and clip.valid == 30 for clip in clips)
    seen = [clip.grid.to_seconds(clip.segments[: len(clip.segments) // 2]) for clip in clips]
    np.testing.assert_allclose(seen[0], [[5.0, 6.0], [7.0, 8.5]], atol=1e-5)
    np.testing.assert_allclose(seen[1], [[30.0, 31.0]], atol=1e-5)
    assert len(cut(annotated(3.0, (1.0, 2.0)))) == 1  # a short video is stitched as a whole


@given(
    duration=st.floats(4, 100),
    starts=st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 5)), max_size=8),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_clips_show_every_short_action_whole_and_their_number_is_fixed(
    duration: float, starts: list[tuple[float, float]], seed: int
) -> None:
    segments = [(s * duration, min(s * duration + n, duration)) for s, n in starts]
    instances = [Instance(start=s, end=e, label="run") for s, e in segments if e > s]
    one = clip_starts(instances, duration, 4.0, np.random.default_rng(seed))
    other = clip_starts(instances, duration, 4.0, np.random.default_rng(seed + 1))
    assert len(one) == len(other)
    assert all(0 <= start <= duration - 4.0 + 1e-9 for start in one)
    for instance in instances:
        if instance.end - instance.start <= 4.0:
            assert any(
                start <= instance.start + 1e-9 and instance.end <= start + 4.0 + 1e-9
                for start in one
            )


def test_the_copy_is_decoded_more_densely(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", 80)
    config = WindowConfig(frames=120, fps=FPS / 2, stitch=StitchConfig(enabled=True, gap=0.1))
    (window,) = sliding_windows(annotated(80 / FPS), ("run",), config, stride=STRIDE)
    assert window.copy is not None
    frames = decode_window(path, window, size=None)
    assert window.valid == 40
    assert window.copy.first == 40 + 12
    assert not frames[40:52].any()
    shown = numbers(frames[window.mask()])
    times = window.frame_times()
    np.testing.assert_array_equal(shown, np.floor(times * FPS + 1e-6))
    assert len(set(shown[:40])) == 40
    assert len(set(shown[40:])) == 68  # of 80, where the clip has 40


@pytest.mark.parametrize(
    "fields", [{"clip": 0.5}, {"clip": 0.0}, {"short": 0.5}, {"gap": 0.6}, {"gap": -0.1}]
)
def test_impossible_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="StitchConfig"):
        StitchConfig(**fields)
