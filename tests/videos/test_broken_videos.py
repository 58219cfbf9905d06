from pathlib import Path

import av
import numpy as np
import pytest

from re2tal.videos.decoding import VideoError, decode, probe
from tests.videos.made_videos import FPS, make_sound, make_video, numbers

FRAMES = 100
MIDDLES = (np.arange(FRAMES) + 0.5) / FPS


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("mp4") / "video.mp4", FRAMES)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def refused(path: Path, reason: str) -> None:
    before = open_files()
    for action in (lambda: probe(path), lambda: decode(path, MIDDLES, size=32)):
        with pytest.raises(VideoError) as caught:
            action()
        assert str(path) in str(caught.value)
        assert reason in caught.value.reason
    assert open_files() == before


def test_files_that_are_no_videos(tmp_path: Path, mp4: Path) -> None:
    refused(tmp_path / "missing.mp4", "no such file")
    refused(tmp_path, "not a file")
    contents = {
        "empty.mp4": (b"", "zero bytes"),
        "text.mp4": (b"This is not a video.\n" * 100, "cannot be opened"),
        "noise.mp4": (np.random.default_rng(0).bytes(5000), "cannot be opened"),
        "head.mp4": (mp4.read_bytes()[:64], "cannot be opened"),
        # the index is at the end of the file
        "cut.mp4": (mp4.read_bytes()[:-2000], "cannot be opened"),
    }
    for name, (content, reason) in contents.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, reason)
    refused(make_sound(tmp_path / "sound.mp4"), "no video stream")


def test_a_list_of_files_does_not_open_them(tmp_path: Path, mp4: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(mp4.read_bytes())
    for name, text in {
        "concat.mp4": "ffconcat version 1.0\nfile video.mp4\n",
        "playlist.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nvideo.mp4\n#EXT-X-ENDLIST\n",
    }.items():
        (tmp_path / name).write_text(text)
        refused(tmp_path / name, "cannot be opened")


def test_a_path_is_never_taken_for_a_protocol(
    tmp_path: Path, mp4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "concat:x.mp4").write_bytes(mp4.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert probe("concat:x.mp4").frames == FRAMES


def test_a_cut_video_gives_what_is_there_and_no_more(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.mp4", 200, container_options={"movflags": "faststart"})
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    np.testing.assert_array_equal(numbers(decode(cut, MIDDLES[:20], size=None)), np.arange(20))
    with pytest.raises(VideoError) as caught:
        decode(cut, np.array([0.0, 7.5]), size=None)
    assert "7.50" in caught.value.reason


@pytest.mark.parametrize("ending", ["mp4", "ts"])
def test_frames_that_lean_on_a_damaged_one_are_not_given_out(tmp_path: Path, ending: str) -> None:
    path = make_video(tmp_path / f"a.{ending}", FRAMES)
    with av.open(str(path)) as container:
        packets = list(container.demux(video=0))
    key = [packet for packet in packets if packet.is_keyframe and packet.pos is not None][3]
    assert key.pos is not None
    content = bytearray(path.read_bytes())
    middle = key.pos + key.size // 2
    content[middle : middle + 20] = bytes(20)
    for number in range(FRAMES):
        time = MIDDLES[[number]]
        if 36 <= number < 48:  # from that key frame to the next
            with pytest.raises(VideoError, match="is damaged"):
                decode(bytes(content), time, size=None)
        else:
            assert numbers(decode(bytes(content), time, size=None)) == [number]


@pytest.mark.parametrize("seed", range(8))
def test_damage_gives_frames_or_a_reason(mp4: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    content = bytearray(mp4.read_bytes())
    start = int(random.integers(0, len(content) - 400))
    content[start : start + 400] = random.bytes(400)
    try:
        frames = decode(bytes(content), MIDDLES, size=32)
    except VideoError:
        return
    assert frames.shape == (FRAMES, 32, 48, 3)
    assert frames.reshape(FRAMES, -1).max(axis=1).min() > 30  # none of them is black


def test_files_are_closed(mp4: Path) -> None:
    before = open_files()
    for _ in range(3):
        decode(mp4, MIDDLES[:3], size=32)
        probe(mp4)
        with pytest.raises(VideoError):
            decode(mp4, np.array([0.0, 100.0]), size=32)
    assert open_files() == before
