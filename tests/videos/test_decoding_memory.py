"""Memory goes with the frames asked for, not with the video."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import pytest

from tests.videos.made_videos import make_video

WIDTH, HEIGHT, FPS, MINUTES = 320, 240, 5, 10
FRAMES = 60 * MINUTES * FPS
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def ten_minutes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packets of five seconds, again and again."""
    folder = tmp_path_factory.mktemp("long")
    short = make_video(
        folder / "short.mp4",
        5 * FPS,
        fps=FPS,
        gop=5 * FPS,
        width=WIDTH,
        height=HEIGHT,
        options={"preset": "ultrafast", "x264-params": "bframes=0"},
    )
    path = folder / "long.mp4"
    with av.open(str(short)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        tick = packets[0].duration or 0
        for number in range(FRAMES):
            packet = av.Packet(bytes(packets[number % len(packets)]))
            packet.stream, packet.time_base = stream, Fraction(packets[0].time_base)
            packet.pts = packet.dts = number * tick
            packet.duration = tick
            packet.is_keyframe = packets[number % len(packets)].is_keyframe
            target.mux(packet)
    return path


def grown(path: Path, times: str, threads: int) -> int:
    """Bytes by which the peak of a fresh process's memory grows while it decodes."""
    script = f"""
import resource, numpy
from re2tal.videos.decoding import decode
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path, threads = {str(path)!r}, {threads}
decode(path, numpy.array([0.1, 0.3, 0.5]), size=None, threads=threads)  # what decoding needs anyway
before = peak()
frames = decode(path, {times}, size=None, threads=threads)
assert frames.shape[1:] == ({HEIGHT}, {WIDTH}, 3)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return int(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("times", "frames", "threads"),
    [
        ("numpy.linspace(0, 599, 8)", 8, 1),
        ("numpy.array([599.0])", 1, 1),
        # every frame goes by, as key frames are too close to one another for seeks
        ("numpy.arange(0.1, 600, 4.0)", 150, 1),
        ("numpy.arange(0.1, 600, 4.0)", 150, 3),
    ],
)
def test_memory_goes_with_the_frames_asked_for(
    ten_minutes: Path, times: str, frames: int, threads: int
) -> None:
    one = WIDTH * HEIGHT * 3
    assert FRAMES * one // 2 > 300 * MEGABYTE  # what all frames would take, undecoded to RGB
    assert grown(ten_minutes, times, threads) < frames * one + 16 * MEGABYTE
