import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2.functional import resize

from re2tal.videos.decoding import VideoError, VideoInfo, decode, probe
from re2tal.videos.reader import TAIL, VideoReader
from tests.videos.made_videos import FPS, make_video, numbers

FRAMES = 100
MIDDLES = (np.arange(FRAMES) + 0.5) / FPS

X264 = {
    "plain": "bframes=3:b-pyramid=2",
    "open": "bframes=3:b-adapt=0:b-pyramid=2:open-gop=1:keyint=15:min-keyint=15:scenecut=0",
    "refresh": "intra-refresh=1:keyint=20",
}
KINDS: dict[str, dict[str, Any]] = {
    "mp4": {"options": {"x264-params": X264["plain"]}},
    "open gop.mp4": {"options": {"x264-params": X264["open"]}},
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "one key frame.mp4": {"gop": 1000},
    "mkv": {"options": {"x264-params": X264["plain"]}},
    "mov": {"codec": "mjpeg", "options": {"strict": "unofficial"}},
    "webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=15"}},
    # their first time stamp is 1.4 s, and a seek does not land where it is told to
    "ts": {"options": {"x264-params": X264["plain"]}},
    "open gop.ts": {"options": {"x264-params": X264["open"]}},
    "refresh.ts": {"options": {"x264-params": X264["refresh"]}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2"}},
}


class Made(NamedTuple):
    path: Path
    whole: np.ndarray


@pytest.fixture(scope="module", params=KINDS)
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    name = request.param if "." in request.param else f"plain.{request.param}"
    path = make_video(tmp_path_factory.mktemp("kinds") / name, FRAMES, **KINDS[request.param])
    return Made(path, decode(path, MIDDLES, size=None))


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("mp4") / "video.mp4", FRAMES)


def test_every_frame_is_found_at_its_time(video: Made) -> None:
    assert video.whole.shape == (FRAMES, 64, 96, 3)
    assert video.whole.dtype == np.uint8
    assert video.whole.flags.c_contiguous
    np.testing.assert_array_equal(numbers(video.whole), np.arange(FRAMES))


def test_a_frame_is_the_same_whatever_else_is_asked_for(video: Made) -> None:
    random = np.random.default_rng(0)
    for number in range(FRAMES):
        alone = decode(video.path, MIDDLES[[number]], size=None)
        np.testing.assert_array_equal(alone[0], video.whole[number])
    for start, step, count in [(95, 1, 5), (40, 1, 20), (3, 31, 4), (50, 17, 3)]:
        wanted = start + step * np.arange(count)
        frames = decode(video.path, MIDDLES[wanted], size=None)
        np.testing.assert_array_equal(frames, video.whole[wanted])
    for _ in range(5):
        wanted = random.integers(0, FRAMES, size=4)  # in any order, with repetitions
        frames = decode(video.path, MIDDLES[wanted], size=None)
        np.testing.assert_array_equal(frames, video.whole[wanted])


def test_the_header_is_read(video: Made) -> None:
    info = probe(video.path)
    assert (info.width, info.height, info.frames) == (96, 64, FRAMES)
    assert info.fps == pytest.approx(FPS)
    assert info.duration == pytest.approx(FRAMES / FPS, abs=0.5 / FPS)


def test_a_time_at_the_very_start_of_a_frame_is_that_frame(mp4: Path) -> None:
    starts = np.arange(FRAMES) * (1 / FPS)  # not exactly i / 25
    np.testing.assert_array_equal(numbers(decode(mp4, starts, size=None)), np.arange(FRAMES))
    before = np.arange(1, FRAMES) / FPS - 1e-4
    np.testing.assert_array_equal(numbers(decode(mp4, before, size=None)), np.arange(FRAMES - 1))


IRREGULAR = np.cumsum([0, *np.random.default_rng(3).choice([1, 1, 2, 3, 30], size=59)]).tolist()


@pytest.fixture(scope="module")
def irregular(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("irregular") / "video.mp4"
    return make_video(path, 60, times=IRREGULAR, gop=7)


@given(times=st.lists(st.floats(0, (IRREGULAR[-1] + 1) / FPS), min_size=1, max_size=12))
@settings(deadline=None, max_examples=40)
def test_the_frame_shown_is_the_last_one_presented(irregular: Path, times: list[float]) -> None:
    shown = [max(i for i, time in enumerate(IRREGULAR) if time / FPS <= t + 1e-6) for t in times]
    found = numbers(decode(irregular, np.array(times), size=None))
    np.testing.assert_array_equal(found, shown)


class Decoder:
    """Stands in for `av.open` and counts the frames that come out of the containers' packets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.frames = 0
        self.open = av.open
        monkeypatch.setattr(av, "open", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        container, counter = self.open(*args, **kwargs), self

        class CountingPacket:
            def __init__(self, packet: Any) -> None:
                self.packet = packet

            def __getattr__(self, name: str) -> Any:
                return getattr(self.packet, name)

            def __bytes__(self) -> bytes:
                return bytes(self.packet)

            def decode(self) -> Any:
                frames = self.packet.decode()
                counter.frames += len(frames)
                return frames

        class Counting:
            def __getattr__(self, name: str) -> Any:
                return getattr(container, name)

            def demux(self, *streams: Any) -> Any:
                return map(CountingPacket, container.demux(*streams))

        return Counting()


def test_no_more_is_decoded_than_needed(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(monkeypatch)
    decode(mp4, MIDDLES[50:70], size=32)
    assert 20 <= decoder.frames <= 20 + 12 + 1  # from the key frame before to the frame behind
    decoder.frames = 0
    decode(mp4, MIDDLES, size=32)
    assert decoder.frames == FRAMES
    decoder.frames = 0
    decode(mp4, MIDDLES[[1, 49, 97]], size=32)
    assert decoder.frames <= 3 * (12 + 1)


def test_seeks_do_not_go_back_again_and_again(video: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(monkeypatch)
    for step in (2, 7):
        decoder.frames = 0
        decode(video.path, MIDDLES[::step], size=16)
        assert decoder.frames < 2 * FRAMES


def test_seeks_without_an_index_are_near_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.ts", 500)
    decoder = Decoder(monkeypatch)
    assert numbers(decode(path, np.array([18.5]), size=None)) == [462]
    assert decoder.frames < 60
    decoder.frames = 0
    decode(path, np.arange(0.02, 19.9, 0.4), size=None)  # finer than key frames are searched for
    assert decoder.frames <= 500


def test_only_a_small_part_of_a_large_file_is_read(tmp_path: Path) -> None:
    class CountingFile(io.BytesIO):
        count = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.count += len(data)
            return data

    content = make_video(tmp_path / "a.mp4", 1000, options={"qp": "0"}).read_bytes()
    file = CountingFile(content)
    assert numbers(decode(file, np.array([(900.5) / FPS]), size=None)) == [900]
    assert file.count < len(content) / 5


def test_path_content_and_file_give_the_same(mp4: Path) -> None:
    expected = decode(mp4, MIDDLES[30:40], size=32)
    content = mp4.read_bytes()
    with mp4.open("rb") as file:
        file.seek(1000)
        for source in (str(mp4), content, io.BytesIO(content), file):
            np.testing.assert_array_equal(decode(source, MIDDLES[30:40], size=32), expected)
        assert not file.closed
        assert probe(file) == probe(mp4) == probe(content)


def test_threads_change_nothing(mp4: Path) -> None:
    times = MIDDLES[5:80:5]
    np.testing.assert_array_equal(
        decode(mp4, times, size=32, threads=3), decode(mp4, times, size=32)
    )


@pytest.mark.parametrize(
    ("width", "height", "size", "shape"),
    [
        (96, 64, None, (64, 96)),
        (96, 64, 32, (32, 48)),
        (64, 96, 32, (48, 32)),
        (96, 64, 128, (128, 192)),
        (64, 64, 31, (31, 31)),
        (100, 64, 33, (33, 52)),  # 51.6 pixels
        (256, 64, 10, (10, 40)),
    ],
)
def test_the_short_side_gets_the_size(
    tmp_path: Path, width: int, height: int, size: int | None, shape: tuple[int, int]
) -> None:
    path = make_video(tmp_path / "a.mp4", 2, width=width, height=height)
    assert decode(path, np.array([0.0]), size=size).shape == (1, *shape, 3)


def test_scaling_is_antialiased_and_keeps_the_brightness(mp4: Path) -> None:
    full = decode(mp4, MIDDLES[:10], size=None)
    small = decode(mp4, MIDDLES[:10], size=24).astype(float)
    tensor = torch.from_numpy(full).permute(0, 3, 1, 2)
    expected = resize(tensor, [24, 36], antialias=True).permute(0, 2, 3, 1).numpy().astype(float)
    assert abs((small - expected).mean()) < 0.7
    assert np.sqrt(((small - expected) ** 2).mean()) < 3.0


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (-90, 3), (180, 2)])
def test_rotated_videos_stand_upright(tmp_path: Path, degrees: int, turns: int) -> None:
    path = make_video(tmp_path / "a.mp4", 5, rotation=degrees)
    upright = decode(path, MIDDLES[:5], size=None)
    assert upright.flags.c_contiguous
    assert upright.shape[1:3] == ((96, 64) if turns % 2 else (64, 96))
    assert (probe(path).height, probe(path).width) == upright.shape[1:3]
    as_stored = np.stack([np.rot90(frame, -turns) for frame in upright])
    np.testing.assert_array_equal(numbers(as_stored), np.arange(5))


def test_the_last_frame_stands_in_for_a_little_while(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 50, sound=2.8)
    end = 50 / FPS
    frames = decode(path, np.array([end, end + TAIL - 0.01]), size=None)
    np.testing.assert_array_equal(numbers(frames), [49, 49])
    assert probe(path).duration == pytest.approx(end)
    with pytest.raises(VideoError, match=r"nothing at second 3\.10: its last frame ends at 2\.00"):
        decode(path, np.array([0.5, end + TAIL + 0.1]), size=None)


def test_times_before_the_start(mp4: Path) -> None:
    assert numbers(decode(mp4, np.array([-0.5 / FPS]), size=None)) == [0]
    with pytest.raises(VideoError, match=r"nothing at second -0\.50: it begins at 0\.00"):
        decode(mp4, np.array([-0.5]), size=None)


@pytest.mark.parametrize("times", [[], [np.nan], [np.inf], [[0.0]]])
def test_times_must_be_a_list_of_numbers(mp4: Path, times: list[Any]) -> None:
    with pytest.raises(ValueError, match="finite times"):
        decode(mp4, np.array(times), size=None)


def test_program_streams_give_the_same_frames_too(tmp_path: Path) -> None:
    # FFmpeg guesses most of their time stamps, so that frame numbers mean nothing here
    path = make_video(tmp_path / "a.mpg", FRAMES, codec="mpeg2video", options={"bf": "2"})
    whole = decode(path, MIDDLES, size=None)
    for number in range(0, FRAMES, 3):
        alone = decode(path, MIDDLES[[number]], size=None)
        np.testing.assert_array_equal(alone[0], whole[number])


def test_errors_and_facts_travel_between_processes(mp4: Path) -> None:
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "is empty")))
    assert (error.source, error.reason, str(error)) == ("a.mp4", "is empty", "a.mp4: is empty")
    info: VideoInfo = pickle.loads(pickle.dumps(probe(mp4)))
    assert info == probe(mp4)


def test_all_frames_in_order_are_those_shown_at_their_times(video: Made) -> None:
    with VideoReader(video.path) as reader:
        tick = float(reader.stream.time_base or 0)
        spans = [(begin * tick, end * tick) for begin, end, *_ in reader.frames()]
    assert len(spans) == FRAMES
    assert spans[0][0] == 0
    assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]]
    middles = np.array(spans).mean(axis=1)
    np.testing.assert_allclose(middles, MIDDLES, atol=2e-3)
    np.testing.assert_array_equal(numbers(decode(video.path, middles, size=None)), range(FRAMES))
