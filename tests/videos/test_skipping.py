from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.videos.decoding import decode
from re2tal.videos.packets import FrameSkipper, can_skip
from re2tal.videos.reader import VideoReader
from tests.videos.made_videos import FPS, make_video
from tests.videos.test_decoding import Decoder

FRAMES = 60
# irregular, with a long pause before the last frame
TIMES = [*np.cumsum([0, *np.random.default_rng(5).choice([1, 1, 2, 5], FRAMES - 2)]).tolist(), 300]

# three frames between two others that no other leans on
SKIPPABLE = "bframes=3:b-adapt=0:b-pyramid=none:scenecut=0"
KINDS: dict[str, dict[str, Any]] = {
    "plain.mp4": {"options": {"x264-params": SKIPPABLE}},
    "one key frame.mp4": {"options": {"x264-params": SKIPPABLE}, "gop": 1000},
    "pyramid.mkv": {"options": {"x264-params": "bframes=7:b-adapt=0:b-pyramid=normal"}},
    "open gop.ts": {"options": {"x264-params": f"{SKIPPABLE}:open-gop=1:keyint=20"}},
    "refresh.ts": {"options": {"x264-params": "bframes=2:b-adapt=0:intra-refresh=1:keyint=20"}},
    "slices.flv": {"options": {"x264-params": f"{SKIPPABLE}:slices=3"}},
    "variable.mp4": {"options": {"x264-params": SKIPPABLE}, "times": TIMES},
    "variable.mkv": {"options": {"x264-params": SKIPPABLE}, "times": TIMES},
}


@pytest.fixture(scope="module", params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name: str = request.param
    return make_video(tmp_path_factory.mktemp("skipping") / name, FRAMES, **KINDS[name])


def every_frame(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The middle of the time for which each frame is shown, and the frames, none left out."""
    with VideoReader(path) as reader:
        tick = float(reader.stream.time_base or 0)
        spans = [
            ((span.begin + span.end) / 2 * tick, span.frame.to_ndarray(format="rgb24"))
            for span in reader.frames()
        ]
    assert len(spans) == FRAMES
    return np.array([middle for middle, _ in spans]), np.stack([frame for _, frame in spans])


def test_what_is_left_out_changes_no_other_frame(path: Path) -> None:
    middles, whole = every_frame(path)

    @given(wanted=st.lists(st.integers(0, FRAMES - 1), min_size=1, max_size=8))
    @settings(deadline=None, max_examples=30)
    def check(wanted: list[int]) -> None:
        frames = decode(path, middles[wanted], size=None)
        np.testing.assert_array_equal(frames, whole[wanted])

    check()
    np.testing.assert_array_equal(decode(path, middles[::7], size=None, threads=3), whole[::7])
    before = decode(path, np.array([-0.5 / FPS]), size=None)
    np.testing.assert_array_equal(before[0], whole[0])


@given(targets=st.lists(st.integers(-2, 330), max_size=6).map(sorted))
@settings(deadline=None, max_examples=60)
def test_exactly_the_frames_that_are_shown_are_needed(path: Path, targets: list[int]) -> None:
    presented = KINDS[path.name].get("times", range(FRAMES))
    shown = [[i for i, at in enumerate(presented) if at <= target] for target in targets]
    expected = {FRAMES - 1, *(found[-1] if found else 0 for found in shown)}
    assert needed(path, targets, presented) == sorted(expected)


def test_what_lies_far_behind_is_forgotten(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 700, width=32, height=32, **KINDS["plain.mp4"])
    targets = [-1, 3, 255, 256, 257, 300, 301, 590, 690]
    assert needed(path, targets, range(700)) == sorted({0, 699, *targets[1:]})


def needed(path: Path, targets: Sequence[int], presented: Sequence[int]) -> list[int]:
    """Which frames are decoded in any case, for targets in the middle of a unit of 1 / FPS."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        unit = 1 / (FPS * float(stream.time_base or 1))
        start = stream.start_time or 0
        wanted = [start + round((target + 0.5) * unit) for target in targets]
        times, decoded = 0, []
        for packet in FrameSkipper(container.demux(stream), stream, wanted):
            state = stream.codec_context.skip_frame
            if packet.pts is None:
                assert state == "DEFAULT"  # the decoder is emptied
                continue
            times += 1
            if state == "DEFAULT":
                # time stamps of Matroska are rounded to milliseconds
                decoded.append(round((packet.pts - start) / unit))
    assert times == len(presented)
    return sorted(list(presented).index(time) for time in decoded)


def test_few_frames_are_decoded_where_few_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", 100, **KINDS["one key frame.mp4"])
    decoder = Decoder(monkeypatch)
    decode(path, (np.arange(0, 100, 10) + 0.5) / FPS, size=16)
    assert decoder.frames <= 26 + 10  # those that others lean on, and those asked for
    decoder.frames = 0
    decode(path, (np.arange(80, 95) + 0.5) / FPS, size=16)
    assert decoder.frames <= 20 + 15 + 5


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
        ("interlaced.mp4", {"options": {"x264-params": "interlaced=1"}}),
        ("no presentation times.avi", {}),
    ],
)
def test_nothing_is_left_out_where_that_is_not_safe(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    path = make_video(tmp_path / name, 5, **settings)
    with av.open(path) as container:
        assert not can_skip(container, container.streams.video[0])


def test_an_error_comes_after_the_packets_before_it(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 20)

    def failing(packets: Iterator[Any]) -> Iterator[Any]:
        for _ in range(7):
            yield next(packets)
        raise av.error.InvalidDataError(1, "unreadable")

    with av.open(path) as container:
        stream = container.streams.video[0]
        packets = FrameSkipper(failing(container.demux(stream)), stream, [10**9])
        given = [next(packets) for _ in range(7)]
        assert [p.dts for p in given] == sorted(p.dts for p in given if p.dts is not None)
        for _ in range(2):
            with pytest.raises(av.error.InvalidDataError):
                next(packets)


def test_packets_out_of_order_are_all_decoded(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 30, **KINDS["plain.mp4"])
    with av.open(path) as container:
        stream = container.streams.video[0]
        read = list(container.demux(stream))
        damaged = iter([*read[:9], read[3], *read[9:]])
        packets = FrameSkipper(damaged, stream, [])
        states = [stream.codec_context.skip_frame for _ in packets]
        assert set(states[12:]) == {"DEFAULT"}
        assert "NONREF" in states[:8]
