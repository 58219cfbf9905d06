"""Synthetic videos that cost a decoder as much as real uploads, and windows of them."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from pipelines.data.decoding import decode_sample
from re2tal.videos.encoding import reproducible
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import Window

WIDTH, HEIGHT = 640, 360

_SHOT = 150  # frames from one cut to the next
_BACKGROUND = 1024  # pixels of a side of the texture that the camera pans over


@dataclass(frozen=True, kw_only=True, slots=True)
class Footage:
    """H.264 video of 360p, with x264's defaults except for these settings."""

    title: str
    gop: int  # largest number of frames from one key frame to the next
    fps: int = 30

    def write(self, path: Path, frames: int) -> None:
        """Write an mp4 with that number of frames."""
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=self.fps)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            stream.options = {**reproducible({"crf": "26", "g": str(self.gop)})}
            for picture in pictures(frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


def pictures(frames: int) -> Iterator[np.ndarray]:
    """Draw a panning texture with other textures moving in front; RGB, uint8 (360, 640, 3)."""
    random = np.random.default_rng(0)
    background = _texture(_BACKGROUND, random)
    actors = [_texture(256, random)[:height, :width] for height, width in ((160, 120), (90, 200))]
    for number in range(frames):
        if number % _SHOT == 0:
            turns = number // _SHOT
            scene = np.rot90(np.roll(background, 331 * turns, axis=0), turns)
        top, left = _sway(number, 70, _BACKGROUND - HEIGHT), _sway(number, 90, _BACKGROUND - WIDTH)
        picture = scene[top : top + HEIGHT, left : left + WIDTH].copy()
        for place, actor in enumerate(actors, start=1):
            height, width, _ = actor.shape
            top = _sway(number, 23 * place, HEIGHT - height)
            left = _sway(number, 31 * place, WIDTH - width)
            picture[top : top + height, left : left + width] = actor
        yield picture


def _sway(number: int, pace: float, reach: int) -> int:
    """Return a position that oscillates between 0 and `reach`, slower with a larger pace."""
    place: float = reach * (0.5 + 0.5 * np.sin(number / pace))
    return round(place)


def _texture(side: int, random: np.random.Generator) -> np.ndarray:
    """Draw noise with the 1/f amplitude spectrum of natural pictures."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf  # no constant part
    channels = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * random.random(frequency.shape))
        channel = np.fft.irfft2(phase / frequency, s=(side, side))
        channels.append(channel / channel.std())
    # most of the contrast of natural pictures is in their brightness
    grey, red, blue = channels
    colours = np.stack([grey + 0.3 * red, grey, grey + 0.3 * blue], axis=-1)
    texture: np.ndarray = np.clip(128 + 40 * colours, 0, 255).astype(np.uint8)
    return texture


def windows_of(
    video_id: str, seconds: float, *, frames: int, fps: float | None, count: int
) -> list[Window]:
    """Draw windows at random places of a video.

    `fps` is the frame rate of a window. Without it, there is a single window, whose frames are
    spread over the whole video.
    """
    fps = fps or frames / seconds
    last = max(0.0, seconds - frames / fps)
    offsets = np.random.default_rng(1).uniform(0, last, count) if last else np.zeros(1)
    return [
        Window(
            video_id=video_id,
            grid=TimeGrid(fps=fps, stride=2, length=frames, offset=float(offset)),
            valid=frames,
            segments=np.zeros((0, 2), np.float32),
            labels=np.zeros(0, np.int64),
        )
        for offset in offsets
    ]


def decoded(uri: str, windows: Iterable[Window], *, size: int) -> int:
    """Decode windows as a decoding task does, and count their frames.

    Raises:
        RuntimeError: if a window cannot be decoded.
    """
    frames = 0
    for index, window in enumerate(windows):
        sample = decode_sample({"index": index, "uri": uri, "window": window}, size=size)
        if sample["error"]:
            raise RuntimeError(sample["error"])
        frames += len(sample["frames"])
    return frames


def frames_a_second(way: Callable[[], int]) -> float:
    """Measure the frames per second of a function that returns a number of frames."""
    before = time.perf_counter()
    frames = way()
    return frames / (time.perf_counter() - before)
