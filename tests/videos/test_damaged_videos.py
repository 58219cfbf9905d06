"""Damage in the middle: what is intact is given, the rest is refused, and nothing stale shown."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.packet import Packet
from av.video.stream import VideoStream

from re2tal.videos.decoding import FrameError, VideoError, decode, decode_intact, probe
from re2tal.videos.reader import VideoReader
from tests.videos.made_videos import FPS, make_video, numbers

FRAMES = 100
GOP = 12
MIDDLES = (np.arange(FRAMES) + 0.5) / FPS
CODECS: dict[str, dict[str, Any]] = {
    "a.mp4": {"options": {"x264-params": "bframes=3:b-adapt=0:b-pyramid=2:scenecut=0"}},
    "a.mkv": {"options": {"x264-params": "bframes=3:b-adapt=0:b-pyramid=2:scenecut=0"}},
    "a.ts": {"options": {"x264-params": "bframes=3:b-adapt=0:b-pyramid=2:scenecut=0"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "sc_threshold": "1000000000"}},
    "vp9.webm": {
        "codec": "libvpx-vp9",
        "options": {"cpu-used": "8", "deadline": "realtime", "lag-in-frames": "0"},
    },
}


def make(folder: Path, name: str) -> Path:
    return make_video(folder / name, FRAMES, gop=GOP, **CODECS[name])


def packets(path: Path) -> "list[Packet[VideoStream]]":  # av's class takes no argument when it runs
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def overwritten(path: Path, start: int, count: int) -> bytes:
    content = bytearray(path.read_bytes())
    content[start : start + count] = bytes(count)
    return bytes(content)


def check(content: bytes, damaged: set[int], *, spared: int = 0) -> None:
    """That all frames come but the damaged ones, however they are asked for.

    Args:
        content: The file.
        damaged: The frames that must be refused.
        spared: How many others may be refused too.
    """
    found = decode_intact(content, MIDDLES, size=None)
    right = numbers(found.frames) == np.arange(FRAMES)
    assert right[found.intact].all()
    assert not found.frames[~found.intact].any()
    refused = set(np.flatnonzero(~found.intact).tolist())
    assert damaged <= refused
    assert len(refused - damaged) <= spared
    assert bool(refused) == bool(found.reasons)
    for number in range(FRAMES):
        if number in damaged:
            with pytest.raises(FrameError):
                decode(content, MIDDLES[[number]], size=None)
        elif number not in refused:
            alone = decode(content, MIDDLES[[number]], size=None)
            np.testing.assert_array_equal(alone[0], found.frames[number])
    first = min(refused)
    np.testing.assert_array_equal(
        numbers(decode(content, MIDDLES[:first], size=None)), np.arange(first)
    )
    with pytest.raises(FrameError):
        decode(content, MIDDLES, size=None)


@pytest.mark.parametrize("name", CODECS)
def test_what_leans_on_a_lost_key_frame_is_lost_and_no_more(tmp_path: Path, name: str) -> None:
    path = make(tmp_path, name)
    key = [packet for packet in packets(path) if packet.is_keyframe][3]
    assert key.pos is not None
    # all of the picture, but not what the container says of it
    header = {"ts": 40}.get(path.suffix[1:], 0)
    size = 100 if path.suffix == ".ts" else key.size
    content = overwritten(path, key.pos + header, size)
    # the frames before a key frame in presentation order may lean on it, and so may a parser be
    # late by a packet
    check(content, set(range(3 * GOP, 4 * GOP)), spared=4)


def test_frames_shown_before_a_damaged_one_that_they_lean_on_are_lost(tmp_path: Path) -> None:
    path = make(tmp_path, "a.mp4")
    in_order = packets(path)
    tick = in_order[0].duration or 1
    shown = {round((packet.pts or 0) / tick): packet for packet in in_order}
    place = next(n for n in range(25, 35) if not in_order[n].is_disposable)
    anchor = in_order[place]
    number = round((anchor.pts or 0) / tick)
    following = [n for n, packet in shown.items() if in_order.index(packet) >= place]
    lost = {n for n in following if n < 36}
    assert min(lost) < number  # decoded after it, but shown before
    assert anchor.pos is not None
    content = overwritten(path, anchor.pos + anchor.size // 2, anchor.size // 2)
    check(content, lost)


def test_a_packet_that_cannot_be_decoded_at_all_is_not_replaced_by_the_frame_before(
    tmp_path: Path,
) -> None:
    path = make_video(tmp_path / "a.mp4", FRAMES, options={"x264-params": "bframes=0"})
    last = packets(path)[-1]
    assert last.pos is not None
    content = overwritten(path, last.pos, last.size)
    found = decode_intact(content, MIDDLES, size=None)
    assert np.flatnonzero(~found.intact).tolist() == [FRAMES - 1]
    # nor behind the end, where the last frame stands in for a second
    with pytest.raises(FrameError, match="is damaged"):
        decode(content, np.array([FRAMES / FPS + 0.5]), size=None)
    assert any("Its end cannot be decoded" in problem for problem in probe(content).problems)


def test_packets_that_matroska_passes_over_are_missed(tmp_path: Path) -> None:
    path = make(tmp_path, "a.mkv")
    in_order = packets(path)
    lost = in_order[40]
    assert lost.pos is not None
    assert not lost.is_keyframe
    # the header of its block is gone: FFmpeg goes on with the next cluster and says nothing
    content = overwritten(path, lost.pos - 8, 8)
    (tmp_path / "damaged.mkv").write_bytes(content)
    assert len(packets(tmp_path / "damaged.mkv")) < FRAMES - 2
    found = decode_intact(content, MIDDLES, size=None)
    assert (numbers(found.frames) == np.arange(FRAMES))[found.intact].all()
    assert 5 <= (~found.intact).sum() <= 3 * GOP


def test_avi_does_not_count_on_when_chunks_are_lost(tmp_path: Path) -> None:
    path = make(tmp_path, "mpeg4.avi")
    lost = packets(path)[40]
    assert lost.pos is not None
    content = overwritten(path, lost.pos - 8, 8)
    found = decode_intact(content, MIDDLES, size=None)
    assert (numbers(found.frames) == np.arange(FRAMES))[found.intact].all()
    assert found.intact[:36].all()
    assert found.intact[51:].all()  # it seeks to where times are right again
    assert not found.intact[40]


BFRAMES = CODECS["a.mkv"]
MPEG4 = CODECS["mpeg4.avi"]
CUT: dict[str, dict[str, Any]] = {
    "index in front.mp4": {**BFRAMES, "container_options": {"movflags": "faststart"}},
    "fragments.mp4": {**BFRAMES, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "a.mkv": BFRAMES,
    "sound.mkv": {**BFRAMES, "sound": 4.0},
    "a.ts": BFRAMES,
    "sound.ts": {**BFRAMES, "sound": 4.0},
    "sound.flv": {**BFRAMES, "sound": 4.0},
    "h264.avi": BFRAMES,
    "sound.avi": {**MPEG4, "options": MPEG4["options"] | {"qmax": "2"}, "sound": 4.0},
    "vp9.webm": CODECS["vp9.webm"],
    "raw.h264": BFRAMES,
}


@pytest.mark.parametrize("name", CUT)
def test_a_cut_video_gives_what_is_there_and_no_more(tmp_path: Path, name: str) -> None:
    path = make_video(tmp_path / name, FRAMES, gop=GOP, **CUT[name])
    whole = path.read_bytes()
    times = (np.arange(FRAMES + FPS) + 0.5) / FPS
    refused = []
    for share in (0.41, 0.47, 0.6, 0.72, 0.8, 0.93):
        size = int(len(whole) * share)
        content = whole[: size + (size % 188 == 0)]  # within a packet of a transport stream
        try:
            found = decode_intact(content, times, size=None)
        except VideoError as error:
            refused.append(error.reason)
            continue
        shown = numbers(found.frames)[found.intact]
        np.testing.assert_array_equal(shown, np.flatnonzero(found.intact))
        assert (share - 0.25) * FRAMES < len(shown) < FRAMES
        info = probe(content)
        assert info.duration * FPS <= shown[-1] + 6  # the last ones may lean on what is missing
        if path.suffix != ".h264":  # nothing tells that more should follow
            assert any("the file was cut off" in problem for problem in info.problems)
        with VideoReader(content) as reader:
            tick = float(reader.stream.time_base or 0)
            for span in reader.frames():
                drawn = span.frame.to_ndarray(format="rgb24")[None]
                middle = (span.begin + span.end) / 2 * tick
                assert span.damage or numbers(drawn) == [int(middle * FPS)]
                assert span.damage or (span.end - span.begin) * tick < 1.1 / FPS
    # FFmpeg opens no file in which a header is cut
    assert len(refused) <= 1
    assert all("cannot be opened" in reason for reason in refused)


def test_a_raw_stream_is_not_trusted_behind_damage(tmp_path: Path) -> None:
    # its packets are counted, and damage may have joined some of them
    options = {"bf": "2", "qmax": "2"}
    path = make_video(tmp_path / "a.m2v", FRAMES, codec="mpeg2video", options=options)
    content, random = path.read_bytes(), np.random.default_rng(0)
    for share in (0.2, 0.4, 0.7):
        start = int(len(content) * share)
        damaged = content[:start] + random.bytes(2500) + content[start + 2500 :]
        found = decode_intact(damaged, MIDDLES, size=None)
        shown = numbers(found.frames)[found.intact]
        np.testing.assert_array_equal(shown, np.flatnonzero(found.intact))
        assert len(shown) > share * FRAMES - 20


def test_a_transport_stream_is_not_prolonged_behind_a_damaged_frame(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.ts", FRAMES, options={"x264-params": "bframes=0"})
    content = path.read_bytes()[: (packets(path)[-1].pos or 0) + 94]
    found = decode_intact(content, np.arange(FRAMES - 3, FRAMES + 20) / FPS + 0.02, size=None)
    assert found.intact[0]
    assert not found.intact[2:].any()  # the one before cannot be told from a damaged one


@pytest.mark.parametrize("ending", ["mkv", "flv", "ts"])
def test_sound_that_outlasts_the_picture_is_no_cut(tmp_path: Path, ending: str) -> None:
    path = make_video(tmp_path / f"a.{ending}", FRAMES, sound=4.8)
    frames = decode(path, np.array([3.99, 4.01, 4.9]), size=None)
    np.testing.assert_array_equal(numbers(frames), [FRAMES - 1] * 3)
    assert probe(path).problems == ()


def test_a_video_of_which_only_the_first_frame_can_be_decoded_is_not_usable(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", FRAMES, gop=1000, options={"x264-params": "bframes=0"})
    content = bytearray(path.read_bytes())
    for packet in packets(path)[1:]:
        assert packet.pos is not None
        content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    found = decode_intact(bytes(content), MIDDLES, size=None)
    assert np.flatnonzero(found.intact).tolist() == [0]
    with pytest.raises(VideoError, match="only its first frame can be decoded"):
        probe(bytes(content))


def test_a_video_of_damage_only_is_refused(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 10)
    content = path.read_bytes()
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content = content[:start] + bytes(end - start) + content[end:]
    with pytest.raises(VideoError, match="no frame of it can be decoded"):
        decode_intact(content, MIDDLES[:10], size=None)
    with pytest.raises(VideoError):
        probe(content)


def test_nothing_is_missing_from_a_sound_video(tmp_path: Path) -> None:
    found = decode_intact(make(tmp_path, "a.mp4"), MIDDLES, size=32)
    assert found.intact.all()
    assert found.reasons == ()
    np.testing.assert_array_equal(found.frames, decode(tmp_path / "a.mp4", MIDDLES, size=32))
