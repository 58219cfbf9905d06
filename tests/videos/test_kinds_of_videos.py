"""Videos of every kind: each gives all its frames, whichever way it is asked for them."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from re2tal.videos.decoding import decode, probe
from re2tal.videos.reader import VideoReader
from tests.videos.made_videos import FPS, make_video, numbers

X264 = "bframes=3:b-pyramid=2"
RAW = "Its header has no duration: its frames last 3.20 s."


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A file to make, and what it must give.

    `frames`, `fps`, `codec` and `problems` are what probing must find. Frame i is shown
    at `times[i] / fps`, counted from the first one.
    """

    name: str
    frames: int = 80
    fps: int = FPS
    codec: str = "h264"
    times: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"options": {"x264-params": X264}})
    problems: tuple[str, ...] = ()

    def middles(self) -> np.ndarray:
        times = np.arange(self.frames) if self.times is None else np.array(self.times)
        return (times - times[0] + 0.5) / self.fps


IRREGULAR = tuple(np.cumsum(np.random.default_rng(5).choice([1, 2, 9], size=80)).tolist())
KINDS = [
    Kind(name="one frame.mp4", frames=1),
    Kind(name="variable rate.mp4", times=IRREGULAR, problems=("Its frame rate varies",)),
    Kind(name="variable rate.mkv", times=IRREGULAR, problems=("Its frame rate varies",)),
    Kind(name="odd.mp4", options={"width": 97, "height": 65, "pixels": "yuv444p"}),
    Kind(name="turned.mp4", options={"rotation": 90}),
    Kind(
        name="ten bits.mp4",
        codec="hevc",
        options={
            "codec": "libx265",
            "pixels": "yuv420p10le",
            "options": {"x265-params": "log-level=none:keyint=15"},
        },
    ),
    Kind(
        name="vp9.webm",
        codec="vp9",
        options={
            "codec": "libvpx-vp9",
            "options": {"cpu-used": "8", "deadline": "realtime", "lag-in-frames": "10"},
        },
    ),
    Kind(
        name="vp8 with hidden frames.webm",
        codec="vp8",
        options={"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    ),
    Kind(
        name="av1.mkv",
        frames=60,
        codec="av1",
        options={"codec": "libsvtav1", "options": {"preset": "10", "crf": "15"}},
    ),
    Kind(name="late start.ts", times=tuple(range(2500, 2580))),
    Kind(
        name="late start and open GOPs.ts",
        times=tuple(range(2500, 2580)),
        options={
            "options": {"x264-params": f"{X264}:open-gop=1:keyint=15:min-keyint=15:scenecut=0"}
        },
    ),
    Kind(
        name="interlaced.mp4",
        options={"options": {"flags": "+ilme+ildct", "x264-params": f"{X264}:tff=1"}},
        problems=("Its frames are interlaced",),
    ),
    Kind(
        name="interlaced.ts",
        codec="mpeg2video",
        options={"codec": "mpeg2video", "options": {"flags": "+ilme+ildct", "bf": "2"}},
        problems=("Its frames are interlaced",),
    ),
    Kind(name="slow.mp4", fps=1, frames=20),
    Kind(name="fast.mkv", fps=120),
    Kind(name="fast.mp4", fps=120),
    Kind(
        name="one key frame in ten minutes.mp4",
        fps=1,
        frames=600,
        options={"gop": 100000, "width": 64, "height": 48, "options": {"preset": "ultrafast"}},
        problems=("Its key frames are up to 599 s apart", "Its end was not decoded"),
    ),
    Kind(name="flash.flv"),
    Kind(name="raw.h264", problems=(RAW,)),
    Kind(
        name="raw.hevc",
        codec="hevc",
        options={"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=15"}},
        problems=(RAW,),
    ),
]


@dataclass(frozen=True)
class Made:
    kind: Kind
    path: Path
    whole: np.ndarray


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    kind: Kind = request.param
    path = tmp_path_factory.mktemp("kinds") / kind.name
    make_video(path, kind.frames, fps=kind.fps, times=kind.times, **kind.options)
    return Made(kind, path, decode(path, kind.middles(), size=None))


def upright(made: Made) -> np.ndarray:
    """The frames as they were drawn."""
    turns = made.kind.options.get("rotation", 0) // 90
    return np.rot90(made.whole, -turns, axes=(1, 2))


def test_every_frame_comes_at_its_time(made: Made) -> None:
    np.testing.assert_array_equal(numbers(upright(made)), np.arange(made.kind.frames))


def test_a_window_alone_is_cut_from_the_whole(made: Made) -> None:
    middles, frames = made.kind.middles(), made.kind.frames
    for first in {0, frames // 3, frames // 2, frames - 1}:
        window = slice(first, first + 5)
        np.testing.assert_array_equal(
            decode(made.path, middles[window], size=None), made.whole[window]
        )


def test_path_content_and_open_file_give_the_same(made: Made) -> None:
    places = [made.kind.frames // 2, made.kind.frames - 1]
    content = made.path.read_bytes()
    with made.path.open("rb") as file:
        for source in (content, io.BytesIO(content), file):
            frames = decode(source, made.kind.middles()[places], size=None)
            np.testing.assert_array_equal(frames, made.whole[places])
            assert probe(source) == probe(made.path)


def test_its_facts_are_found(made: Made) -> None:
    kind, info = made.kind, probe(made.path)
    assert info.duration == pytest.approx(kind.middles()[-1] + 0.5 / kind.fps, abs=0.3 / kind.fps)
    if kind.times is None or kind.times == tuple(range(kind.times[0], kind.times[-1] + 1)):
        assert info.fps == pytest.approx(kind.fps, rel=0.01)
        assert info.frames == kind.frames
    assert (info.height, info.width) == made.whole.shape[1:3]
    assert (info.codec, info.rotation) == (kind.codec, kind.options.get("rotation", 0))
    assert len(info.problems) == len(kind.problems), info.problems
    for found, expected in zip(info.problems, kind.problems, strict=True):
        assert expected in found


def test_these_are_the_kinds_that_they_are_meant_to_be(tmp_path: Path) -> None:
    for name in ("late start.ts", "raw.h264", "vp9.webm", "fast.mkv"):
        kind = next(kind for kind in KINDS if kind.name == name)
        path = make_video(tmp_path / name, 20, times=kind.times and kind.times[:20], **kind.options)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.frames == 0
            assert name != "late start.ts" or (stream.start_time or 0) > 90 * 90000
    kind = next(kind for kind in KINDS if kind.name == "interlaced.mp4")
    path = make_video(tmp_path / kind.name, 5, **kind.options)
    with VideoReader(path) as reader:
        assert reader.frame_at(0.0).interlaced_frame


def test_interlaced_frames_are_woven_of_their_two_fields(tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if kind.name == "interlaced.mp4")
    lossless = {"flags": "+ilme+ildct", "qp": "0", "x264-params": "tff=1"}
    path = make_video(tmp_path / kind.name, 5, options=lossless)
    plain = make_video(tmp_path / "plain.mp4", 5, options={"qp": "0"})
    frames, expected = (decode(p, kind.middles()[:5], size=None).astype(int) for p in (path, plain))
    assert np.abs(frames - expected).max() < 24  # chroma is sampled otherwise
    assert np.abs(frames - expected).mean() < 1


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 120 frames whose edit list shows those from the 12th on only."""
    folder = tmp_path_factory.mktemp("edited")
    whole = make_video(folder / "whole.mp4", 120, options={"x264-params": "bframes=0"})
    path = folder / "edited.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None and packet.pts is not None:
                shift = 11 * packet.duration if packet.duration else 0
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = stream
                target.mux(packet)
    return path


def test_frames_that_an_edit_list_hides_are_not_shown(edited: Path) -> None:
    with av.open(str(edited)) as container:
        assert container.streams.video[0].frames == 120
    frames = decode(edited, (np.arange(109) + 0.5) / FPS, size=None)
    np.testing.assert_array_equal(numbers(frames), np.arange(11, 120))
    for number in (0, 50, 108):
        alone = decode(edited, np.array([(number + 0.5) / FPS]), size=None)
        np.testing.assert_array_equal(alone[0], frames[number])
    info = probe(edited)
    assert info.frames == 109
    assert info.duration == pytest.approx(109 / FPS)
    assert any("claims 120 frames" in problem for problem in info.problems)
