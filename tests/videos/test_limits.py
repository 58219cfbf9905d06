import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from re2tal.videos import limits as limits_module
from re2tal.videos.decoding import Limits, VideoError, decode, decode_intact, probe
from tests.videos.made_videos import FPS, make_video

FRAMES = 200
MIDDLES = (np.arange(FRAMES) + 0.5) / FPS


@pytest.fixture(scope="module")
def long_gop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("long") / "a.mp4", FRAMES, gop=1000)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that goes on by a second whenever the limits look at it."""
    seen: list[float] = []

    def monotonic() -> float:
        seen.append(float(len(seen)))
        return seen[-1]

    monkeypatch.setattr(limits_module, "monotonic", monotonic)
    return seen


def test_decoding_ends_when_its_time_is_over(long_gop: Path, looks: list[float]) -> None:
    for action in (decode, decode_intact):
        looks.clear()
        with pytest.raises(VideoError, match="longer than the limit of 50 s: ask for fewer"):
            action(long_gop, MIDDLES[[180]], size=32, limits=Limits(seconds=50))
        assert len(looks) == 52  # it stops at once, in the middle of the packets before the frame
    decode(long_gop, MIDDLES[[20]], size=32, limits=Limits(seconds=50))


def test_probing_ends_when_its_time_is_over(tmp_path: Path, looks: list[float]) -> None:
    path = make_video(tmp_path / "raw.h264", FRAMES)  # all its packets are counted
    with pytest.raises(VideoError, match="longer than the limit of 100 s"):
        probe(path, limits=Limits(seconds=100))
    assert probe(path, limits=Limits(seconds=1000)).frames == FRAMES


def test_pictures_over_the_limit_are_refused(long_gop: Path) -> None:
    enough = Limits(pixels=96 * 64)
    assert decode(long_gop, MIDDLES[:1], size=32, limits=enough).shape == (1, 32, 48, 3)
    assert probe(long_gop, limits=enough).width == 96
    for ask in (
        lambda limits: decode(long_gop, MIDDLES[:1], size=8, limits=limits),
        lambda limits: probe(long_gop, limits=limits),
    ):
        with pytest.raises(VideoError, match=r"96x64 are over the limit of 6143 pixels: raise"):
            ask(Limits(pixels=96 * 64 - 1))


@pytest.mark.slow
@pytest.mark.parametrize("side", [12_000, 30_000])
@pytest.mark.parametrize("picture_too", [False, True])
def test_a_header_that_claims_too_much_takes_no_memory(
    tmp_path: Path, side: int, picture_too: bool
) -> None:
    options = {"codec": "mjpeg", "pixels": "yuvj420p"}
    content = make_video(tmp_path / "a.avi", 5, width=336, height=272, **options).read_bytes()  # type: ignore[arg-type]
    in_header = [(n).to_bytes(4, "little") for n in (336, 272, side)]
    in_picture = [(n).to_bytes(2, "big") for n in (336, 272, side)]
    header = in_header[0] + in_header[1]
    assert header in content
    content = content.replace(header, in_header[2] * 2)
    if picture_too:
        picture = b"\xff\xc0\0\x11\x08" + in_picture[1] + in_picture[0]
        assert picture in content
        content = content.replace(picture, picture[:5] + in_picture[2] * 2)
    (tmp_path / "claims.avi").write_bytes(content)
    script = f"""
import resource, numpy
from re2tal.videos.decoding import VideoError, decode, probe
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode({str(tmp_path / "a.avi")!r}, numpy.array([0.1]), size=32)
before = peak()
for action in (probe, lambda source: decode(source, numpy.array([0.1]), size=32)):
    try:
        action({str(tmp_path / "claims.avi")!r})
        print("given")
    except VideoError as error:
        print("refused", error.reason)
print(peak() - before)
"""
    out = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    *outcomes, grown = out
    # without pictures of that size, the claim is forgotten
    expected = "refused" if picture_too else "given"
    assert [outcome.split()[0] for outcome in outcomes] == [expected] * 2, out
    assert int(grown) < 50_000  # KiB; one picture of 12000x12000 takes 210,000, and RGB twice that


def test_results_over_the_limit_are_refused_before_they_are_made(long_gop: Path) -> None:
    needed = 7 * 32 * 48 * 3
    frames = decode(long_gop, MIDDLES[:7], size=32, limits=Limits(result_bytes=needed))
    assert frames.nbytes == needed
    reason = f"7 frames of 48x32 take {needed} bytes, over the limit of {needed - 1}: ask for"
    with pytest.raises(VideoError, match=re.escape(reason)):
        decode(long_gop, MIDDLES[:7], size=32, limits=Limits(result_bytes=needed - 1))


@pytest.mark.parametrize("name", ["seconds", "pixels", "result_bytes"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"Limits.{name} must be positive, not 0"):
        Limits(**{name: 0})
