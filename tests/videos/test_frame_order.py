"""Files whose frames have no times, or wrong ones: they are shown in the decoder's order."""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np
import pytest
from av.codec.context import CodecContext
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType

from re2tal.videos.decoding import decode, decode_intact, probe
from re2tal.videos.reader import VideoReader
from tests.videos.made_videos import FPS, make_video, numbers, picture

FRAMES = 90
LATE = 70  # the first frame of a file from which on there are B-frames
PYRAMID = "bframes=3:b-adapt=0:b-pyramid=2:scenecut=0"
OPEN = f"{PYRAMID}:open-gop=1:keyint=15:min-keyint=15"
H264: dict[str, Any] = {"options": {"x264-params": PYRAMID}}
HEVC: dict[str, Any] = {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=15"}}
MPEG4: dict[str, Any] = {"codec": "mpeg4", "options": {"bf": "2", "sc_threshold": "1000000000"}}
GO_BACK = "Its frame times go back: its frames are shown in the decoder's order."


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A file to make, and whether its frames have times that cannot be true."""

    name: str
    settings: dict[str, Any] | None = None  # of `make_video`; None if `make_avi` makes it
    fps: int = FPS
    copied_from: str = ""  # ending of the file from which it is copied
    wrong_times: bool = False


KINDS = [
    Kind(name="no B-frames.avi", settings={"options": {"x264-params": "bframes=0"}}),
    Kind(name="pyramid.avi", settings=H264),
    Kind(name="open gop.avi", settings={"options": {"x264-params": OPEN}}),
    Kind(name="hevc.avi"),
    Kind(name="mostly empty chunks.avi"),
    Kind(name="copied.mp4", settings=H264, copied_from=".avi", wrong_times=True),
    Kind(name="copied mpeg4.mp4", settings=MPEG4, copied_from=".avi", wrong_times=True),
    Kind(name="raw.h264", settings=H264, fps=10),
    Kind(name="raw.hevc", settings=HEVC, fps=10),
    Kind(name="raw.m4v", settings={**MPEG4, "container": "m4v"}, fps=10),
    Kind(name="raw.m2v", settings={**MPEG4, "codec": "mpeg2video"}),
    Kind(name="raw.m1v", settings={**MPEG4, "codec": "mpeg1video", "container": "mpeg1video"}),
    Kind(name="packed.avi", wrong_times=True),
    Kind(name="packed late.avi", wrong_times=True),
    Kind(name="packed.mp4", copied_from=".avi", wrong_times=True),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind: Kind = request.param
    path = tmp_path_factory.mktemp("order") / kind.name
    first = path.with_suffix(kind.copied_from) if kind.copied_from else path
    if kind.settings is not None:
        make_video(first, FRAMES, fps=kind.fps, **kind.settings)
    else:
        make_avi(first)
    if kind.copied_from:
        copy(first, path)
    return kind, path, (np.arange(FRAMES) + 0.5) / kind.fps


def copy(source: Path, target: Path) -> None:
    """Copies the packets into another file, without knowing when their frames are presented."""
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if packet.dts is not None:
                packet.pts = packet.dts
                packet.stream = stream
                written.mux(packet)


# As written by Xvid: a P-frame of which nothing is coded.
PLACEHOLDER = bytes.fromhex("000001b6514f")


class Chunk(NamedTuple):
    """Content, time in ticks, and whether it is a key frame."""

    content: bytes
    time: int
    key: bool


def encoded(codec: str, late: int = 0, **options: str) -> list[Chunk]:
    """Packets in decoding order, at their times of presentation, which AVI does not hold.

    B-frames come from frame `late` on.
    """
    encoder = cast("VideoCodecContext", CodecContext.create(codec, "w"))
    encoder.width, encoder.height, encoder.pix_fmt = 96, 64, "yuv420p"
    encoder.time_base, encoder.framerate, encoder.gop_size = Fraction(1, FPS), Fraction(FPS), 12
    encoder.options = options
    chunks: list[Chunk] = []
    for number in range(FRAMES + 1):
        frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, FPS)
        if number <= late:
            frame.pict_type = PictureType.P if number % 12 else PictureType.I
        packets = encoder.encode(frame if number < FRAMES else None)
        chunks += [Chunk(bytes(p), p.pts or 0, p.is_keyframe) for p in packets]
    return chunks


def packed(late: bool) -> list[Chunk]:
    """MPEG-4 as DivX wrote it: a B-frame in one packet with the frame that is shown behind it.

    The packet after that holds a placeholder, and the second one nothing, as the encoder was late.
    """
    options = {"sc_threshold": "1000000000", "b_strategy": "0"}
    chunks = encoded("mpeg4", late=LATE if late else 0, bf="1", **options)
    found: list[Chunk] = []
    while chunks:
        content = re.sub(rb"Lavc[\d.]+", b"DivX503b1393p", chunks[0].content)
        joined = len(chunks) > 1 and chunks[1].time < chunks[0].time
        parts = [content + chunks[1].content, PLACEHOLDER] if joined else [content]
        for part in parts:
            time = len(found) + bool(found)
            found.append(Chunk(part, time, chunks[0].key))  # as Xvid marks them
        del chunks[: len(parts)]
    return found


def make_avi(path: Path) -> None:
    """Writes a file that this FFmpeg does not make by itself."""
    rate = FPS
    if path.stem.startswith("packed"):
        chunks, tag = packed(late="late" in path.stem), b"DX50"
    elif path.stem == "hevc":
        chunks, tag = encoded("libx265", **HEVC["options"]), b"HEVC"
        chunks = [chunk._replace(time=time) for time, chunk in enumerate(chunks)]
    else:
        chunks, tag = encoded("libx264", **H264["options"]), b"H264"
        chunks = [chunk._replace(time=24 * time) for time, chunk in enumerate(chunks)]
        rate = 24 * FPS
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.start_encoding()
        for content, time, key in chunks:
            packet = Packet(content)
            packet.pts = packet.dts = time
            packet.stream, packet.time_base = stream, Fraction(1, rate)
            packet.is_keyframe = key
            container.mux(packet)
    path.write_bytes(path.read_bytes().replace(b"FMP4", tag))


def test_every_frame_comes_in_its_place(made: Any) -> None:
    _, path, middles = made
    found = decode_intact(path, middles, size=None)
    assert found.reasons == ()
    np.testing.assert_array_equal(numbers(found.frames), np.arange(FRAMES))


def test_a_frame_is_the_same_whatever_else_is_asked_for(made: Any) -> None:
    _, path, middles = made
    whole = decode(path, middles, size=None)
    for number in range(0, FRAMES, 3):
        np.testing.assert_array_equal(decode(path, middles[[number]], size=None)[0], whole[number])
    for wanted in ([7, 8, 9, 30], [1, 25, 59], [58, 59]):
        for threads in (1, 3):
            frames = decode(path, middles[wanted], size=None, threads=threads)
            np.testing.assert_array_equal(frames, whole[wanted])


def test_frames_follow_one_another_at_an_even_rate(made: Any) -> None:
    kind, path, _ = made
    with VideoReader(path) as reader:
        tick = float(reader.stream.time_base or 0)
        spans = list(reader.frames())
    shown = np.stack([span.frame.to_ndarray(format="rgb24") for span in spans])
    np.testing.assert_array_equal(numbers(shown), np.arange(FRAMES))
    assert not any(span.damage for span in spans)
    times = np.arange(FRAMES) / kind.fps
    np.testing.assert_allclose([span.begin * tick for span in spans], times, atol=1e-3)


def test_its_facts_are_found(made: Any) -> None:
    kind, path, _ = made
    info = probe(path)
    assert info.duration == pytest.approx(FRAMES / kind.fps, abs=1.01 / kind.fps)
    assert info.frames == FRAMES
    assert info.fps == pytest.approx(kind.fps, rel=0.02)
    expected = [GO_BACK] * kind.wrong_times
    if kind.name.startswith("raw"):
        expected.append(f"Its header has no duration: its frames last {FRAMES / kind.fps:.2f} s.")
    assert list(info.problems) == expected
