"""Videos encoded anew, in pieces, show at every time what their source shows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal.videos.decoding import VideoError, decode
from re2tal.videos.pieces import Pieces, decode_source
from re2tal.videos.reader import TAIL, VideoReader
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.transcoding import Piece, TranscodeConfig, transcode
from re2tal.videos.windows import Window, decode_window
from tests.videos.made_videos import FPS, make_video, numbers

IRREGULAR = np.cumsum([0, *np.random.default_rng(3).choice([1, 1, 2, 3, 30], size=59)]).tolist()
MIDDLES = (np.arange(150) + 0.5) / FPS
PIECE = TranscodeConfig(size=None, gop=8, quality=10, piece_seconds=1.3)  # borders inside of frames

KINDS: dict[str, dict[str, Any]] = {
    "plain.mp4": {},
    "irregular.mp4": {"frames": 60, "times": IRREGULAR, "gop": 7},
    "rotated.mp4": {"rotation": 90},
    "upside down.mp4": {"rotation": 180},
    "full range.mov": {"codec": "mjpeg", "options": {"strict": "unofficial"}},
    "milliseconds.webm": {
        "codec": "libvpx-vp9",
        "options": {"cpu-used": "8", "deadline": "realtime"},
    },
    "offset.ts": {"options": {"x264-params": "bframes=3:b-adapt=0:open-gop=1:keyint=15"}},
    "old.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
}


def pieces_of(path: Path, config: TranscodeConfig) -> tuple[list[Piece], Pieces]:
    with VideoReader(path) as reader:
        made = list(transcode(reader, config))
    starts = tuple(piece.start for piece in made)
    read = [piece.video for piece in made].__getitem__
    return made, Pieces(name=path.name, starts=starts, read=read, like=made[-1].source)


def noise_ratio(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, of the worst frame."""
    errors = ((one.astype(float) - other) ** 2).mean(axis=(1, 2, 3))
    return float(10 * np.log10(255**2 / max(errors.max(), 1e-9)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_time_shows_the_frame_of_the_source(tmp_path: Path, kind: str) -> None:
    path = make_video(tmp_path / kind, **{"frames": 100, **KINDS[kind]})
    made, pieces = pieces_of(path, PIECE)
    assert len(made) > 2
    assert sum(piece.frames for piece in made) == KINDS[kind].get("frames", 100)
    assert [piece.end for piece in made[:-1]] == [piece.start for piece in made[1:]]
    for piece in made:
        assert decode(piece.video, np.array([0.0]), size=None).shape[1:3] == (
            piece.height,
            piece.width,
        )
    end = made[-1].end
    borders = np.array([piece.start for piece in made])
    times = np.concatenate(
        [
            np.random.default_rng(0).uniform(0, end, 60),
            *(borders + shift for shift in (-2e-3, -2e-6, 0.0, 2e-6, 2e-3)),
            [end + TAIL - 0.02],
        ]
    )
    times = times[times >= 0]
    expected = decode(path, times, size=None)
    found = decode_source(pieces, times, size=None)
    assert found.shape == expected.shape
    assert found.flags.c_contiguous
    assert noise_ratio(found, expected) > 40
    upright = {"rotated.mp4": -1, "upside down.mp4": -2}.get(kind, 0)
    shown, wanted = (
        numbers(np.rot90(frames, upright, axes=(1, 2))) for frames in (found, expected)
    )
    np.testing.assert_array_equal(shown, wanted)


@pytest.mark.parametrize("rotation", [0, 90])
def test_scaling_twice_moves_nothing(tmp_path: Path, rotation: int) -> None:
    # 202x128 at 60 pixels is 94x60, but 98x62, to which it is scaled first, would be 96x60
    path = make_video(tmp_path / "a.mp4", 20, width=202, height=128, rotation=rotation)
    (piece,), pieces = pieces_of(path, replace(PIECE, size=62))
    assert sorted((piece.width, piece.height)) == [62, 98]
    expected = decode(path, MIDDLES[:20], size=60)
    found = decode_source(pieces, MIDDLES[:20], size=60)
    assert found.shape == expected.shape
    assert noise_ratio(found, expected) > 30


@pytest.fixture(scope="module")
def irregular(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pieces]:
    path = make_video(tmp_path_factory.mktemp("irregular") / "a.mp4", 60, times=IRREGULAR, gop=7)
    return path, pieces_of(path, PIECE)[1]


@given(times=st.lists(st.floats(-0.03, IRREGULAR[-1] / FPS + 0.9), min_size=1, max_size=12))
@settings(deadline=None, max_examples=30)
def test_times_in_any_order_and_number(irregular: tuple[Path, Pieces], times: list[float]) -> None:
    path, pieces = irregular
    found = decode_source(pieces, np.array(times), size=None)
    np.testing.assert_array_equal(numbers(found), numbers(decode(path, np.array(times), size=None)))


def test_only_the_pieces_that_a_window_overlaps_are_read(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 250)
    made, pieces = pieces_of(path, TranscodeConfig(size=None, piece_seconds=2.0))
    assert [piece.start for piece in made] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert [piece.frames for piece in made] == [50] * 5
    read: list[int] = []

    def noted(number: int) -> bytes:
        read.append(number)
        return pieces.read(number)

    noting = Pieces(name="a", starts=pieces.starts, read=noted)
    grid = TimeGrid(fps=FPS, stride=1, length=70, offset=3.0)
    window = Window(
        video_id="a",
        grid=grid,
        valid=60,
        segments=np.empty((0, 2), np.float32),
        labels=np.empty(0, np.int64),
    )
    frames = decode_window(noting, window, size=None)
    assert read == [1, 2]
    np.testing.assert_array_equal(numbers(frames[:60]), np.arange(75, 135))
    assert not frames[60:].any()


def test_one_piece_holds_all_of_it_if_there_are_to_be_no_borders(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 60)
    (piece,), _ = pieces_of(path, TranscodeConfig(size=None, piece_seconds=None))
    assert (piece.start, piece.end, piece.frames) == (0.0, 60 / FPS, 60)


@pytest.mark.parametrize("fps", [12.5, 10.0, 29.97, 60.0])
def test_a_fixed_rate_gives_the_frames_that_a_grid_of_that_rate_samples(
    tmp_path: Path, fps: float
) -> None:
    path = make_video(tmp_path / "a.mp4", 60, times=IRREGULAR, gop=7)
    made, pieces = pieces_of(
        path, TranscodeConfig(size=None, fps=fps, piece_seconds=1.5, quality=10)
    )
    grid = TimeGrid(fps=fps, stride=1, length=round(made[-1].end * fps))
    times = grid.frame_times()
    assert sum(piece.frames for piece in made) == len(times)
    np.testing.assert_array_equal(
        numbers(decode_source(pieces, times, size=None)), numbers(decode(path, times, size=None))
    )


def test_a_video_shorter_than_half_a_frame_still_shows_one(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 1)
    (piece,), pieces = pieces_of(path, TranscodeConfig(size=None, fps=5.0))
    assert piece.frames == 1
    assert numbers(decode_source(pieces, np.array([0.02]), size=None)) == [0]


@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [
        (96, 64, None, (96, 64)),
        (97, 65, None, (96, 64)),
        (64, 96, 32, (32, 48)),
        (101, 65, 32, (50, 32)),
        (96, 64, 200, (96, 64)),  # never enlarged
    ],
)
def test_sides(
    tmp_path: Path, width: int, height: int, size: int | None, expected: tuple[int, int]
) -> None:
    path = make_video(
        tmp_path / "a.mkv", 3, width=width, height=height, codec="ffv1"
    )  # a codec that takes odd sides
    (piece,), _ = pieces_of(path, TranscodeConfig(size=size))
    assert (piece.width, piece.height) == expected
    assert decode(piece.video, np.array([0.0]), size=None).shape == (1, *expected[::-1], 3)


def test_the_same_video_gives_the_same_bytes_and_key_frames_are_close(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 100, gop=1000)
    (one,), _ = pieces_of(path, TranscodeConfig(gop=10))
    (other,), _ = pieces_of(path, TranscodeConfig(gop=10))
    assert one == other
    with VideoReader(one.video) as reader:
        keys = [span.begin for span in reader.frames() if span.frame.key_frame]
        tick = float(reader.stream.time_base or 0)
    assert np.diff(np.array(keys) * tick * FPS).max() <= 10.001
    assert len(keys) >= 10


def test_the_error_of_a_piece_names_video_and_second(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 100)
    _, pieces = pieces_of(path, TranscodeConfig(size=None, piece_seconds=2.0))
    with pytest.raises(VideoError, match=r"a.mp4: piece 1, .* from second 2\.00: shows nothing"):
        decode_source(pieces, np.array([0.5, 6.0]), size=None)
    with pytest.raises(ValueError, match="finite times"):
        decode_source(pieces, np.array([]), size=None)
    with pytest.raises(ValueError, match="finite times"):
        decode_source(pieces, np.array([1.0, np.nan]), size=None)


@pytest.mark.parametrize(
    "wrong",
    [{"size": 33}, {"size": 2}, {"quality": 60}, {"gop": 0}, {"fps": 0.0}, {"piece_seconds": 0.1}],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must be"):
        TranscodeConfig(**wrong)


@pytest.mark.parametrize("fps", [None, 25.0])
def test_damaged_stretches_are_pieces_without_frames(tmp_path: Path, fps: float | None) -> None:
    path = make_video(tmp_path / "a.mkv", 150, gop=10)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2500] = bytes(2500)
    path.write_bytes(content)
    made, pieces = pieces_of(path, replace(PIECE, fps=fps))
    damaged = [piece for piece in made if piece.damage]
    assert damaged
    assert all(piece.frames == 0 and not piece.video for piece in damaged)
    assert sum(piece.end - piece.start for piece in damaged) < 2.0
    assert [piece.end for piece in made[:-1]] == [piece.start for piece in made[1:]]
    for number in range(150):
        time = np.array([MIDDLES[number]])
        if any(piece.start <= time < piece.end for piece in damaged):
            continue
        found = decode_source(pieces, time, size=None)
        assert numbers(found) == numbers(decode(path, time, size=None)) == number


def test_a_video_without_an_intact_frame_is_an_error(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", 30, gop=100)
    content = bytearray(path.read_bytes())
    content[1500:-500] = bytes(len(content) - 2000)
    path.write_bytes(content)
    with pytest.raises(VideoError), VideoReader(path) as reader:
        list(transcode(reader, PIECE))
