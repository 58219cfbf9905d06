from fractions import Fraction
from pathlib import Path

import av
import pytest
from av.stream import Disposition

from re2tal.videos.decoding import VideoError, probe
from re2tal.videos.reader import VideoReader
from tests.videos.made_videos import FPS, make_video, picture


def test_sound_does_not_count(tmp_path: Path) -> None:
    for ending in ("mp4", "mkv"):
        info = probe(make_video(tmp_path / f"a.{ending}", 50, sound=3.5))
        assert info.duration == pytest.approx(50 / FPS, abs=0.01)
        assert info.frames == 50


@pytest.mark.parametrize(("degrees", "turned"), [(90, True), (180, False), (-90, True)])
def test_rotation_is_counterclockwise(tmp_path: Path, degrees: int, turned: bool) -> None:
    info = probe(make_video(tmp_path / "a.mp4", 5, rotation=degrees))
    assert info.rotation == degrees % 360
    assert (info.width, info.height) == ((64, 96) if turned else (96, 64))


def mux(path: Path, *, late: int = 0, cover: bool = False) -> Path:
    """A file with sound, whose picture begins later, and with a cover picture in front."""
    whole = make_video(path.with_name("whole.mp4"), 50, sound=2.0)
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        if cover:
            front = target.add_stream("mjpeg", rate=1)
            front.width, front.height, front.pix_fmt = 96, 64, "yuvj420p"
            front.disposition = Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(picture(1), format="rgb24")
            front_packets = front.encode(frame) + front.encode(None)
        streams = [target.add_stream_from_template(stream) for stream in source.streams]
        if cover:
            target.mux(front_packets)
        for packet in source.demux():
            if packet.dts is not None and packet.pts is not None and packet.time_base is not None:
                picture_packet = packet.stream_index == 0
                shift = round(late / packet.time_base) if picture_packet else 0
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = streams[packet.stream_index]
                target.mux(packet)
    return path


def test_a_picture_that_begins_after_its_sound_is_told(tmp_path: Path) -> None:
    info = probe(mux(tmp_path / "a.mkv", late=3))
    assert info.duration == pytest.approx(2.0, abs=0.01)
    (problem,) = info.problems
    assert problem.startswith("Its picture begins 3.")
    assert probe(mux(tmp_path / "b.mkv")).problems == ()


def test_a_cover_picture_is_left_out(tmp_path: Path) -> None:
    info = probe(mux(tmp_path / "a.mp4", cover=True))
    assert (info.codec, info.frames) == ("h264", 50)
    assert "It holds a cover picture, which is left out." in info.problems


def test_only_both_ends_of_a_video_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mkv", 1000)
    seen: list[int] = []
    packets = VideoReader.packets

    def counting(self: VideoReader) -> object:
        for packet in packets(self):
            seen.append(packet.pts or 0)
            yield packet

    monkeypatch.setattr(VideoReader, "packets", counting)
    assert probe(path).duration == pytest.approx(40.0)
    assert 0 < len(seen) < 100
    assert min(seen) > 35_000  # milliseconds


def test_a_file_without_a_frame_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.start_encoding()
    with pytest.raises(VideoError):
        probe(path)
