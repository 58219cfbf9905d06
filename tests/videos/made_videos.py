"""Small real videos whose frames can be told apart after compression."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

from re2tal.videos.encoding import reproducible

BITS = (2, 6)  # rows and columns of blocks; each is one bit of the frame's number
FPS = 25


def picture(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """A frame that shows its number in binary, as light and dark blocks with some texture."""
    bits = (number >> np.arange(BITS[0] * BITS[1])) & 1
    rows = np.arange(height) * BITS[0] // height
    columns = np.arange(width) * BITS[1] // width
    light = bits.reshape(BITS)[rows[:, None], columns[None]]
    texture = (np.arange(width) * 7 + np.arange(height)[:, None] * 3 + number * 5) % 32
    red_green_blue = np.stack([light * 130 + 40 + texture] * 3, axis=-1)
    return red_green_blue.astype(np.uint8)


def numbers(frames: np.ndarray) -> np.ndarray:
    """The number that each frame shows: (T, H, W, 3) to (T,)."""
    _, height, width, _ = frames.shape
    rows = ((np.arange(BITS[0]) + 0.5) * height / BITS[0]).astype(int)
    columns = ((np.arange(BITS[1]) + 0.5) * width / BITS[1]).astype(int)
    # the middle of a block, a few pixels wide, as its edges are blurred
    reach = np.arange(-2, 3)
    rows, columns = rows[:, None] + reach, columns[:, None] + reach
    blocks = frames[:, rows[:, None, :, None], columns[None, :, None, :]]
    bits = blocks.mean(axis=(3, 4, 5)) > 120
    return cast("np.ndarray", bits.reshape(len(frames), -1) @ (1 << np.arange(BITS[0] * BITS[1])))


def make_video(
    path: Path,
    frames: int = 100,
    *,
    width: int = 96,
    height: int = 64,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    fps: int = FPS,
    gop: int = 12,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    sound: float = 0.0,
    container: str | None = None,
) -> Path:
    """Writes a video whose frame i shows the number i.

    Args:
        path: Where; its ending selects the container.
        frames: How many.
        width: Pixels.
        height: Pixels.
        codec: FFmpeg's name of the encoder.
        pixels: FFmpeg's name of the pixel format.
        fps: Frames per second.
        gop: Largest distance of key frames.
        options: Of the encoder.
        container_options: Of the container.
        times: When each frame is presented, in units of 1 / fps; evenly if None.
        rotation: Counterclockwise degrees for the metadata.
        sound: Seconds of sound beside the picture.
        container: FFmpeg's name of the container, if the ending does not select it.
    """
    with av.open(str(path), "w", format=container, options=container_options or {}) as file:
        video = cast("VideoStream", file.add_stream(codec, rate=fps))
        video.width, video.height, video.pix_fmt = width, height, pixels
        video.codec_context.gop_size = gop
        settings = options or {}
        video.codec_context.options = reproducible(settings) if codec == "libx264" else settings
        video.codec_context.time_base = Fraction(1, fps)
        if rotation:
            video.set_display_rotation(rotation)
        audio = file.add_stream("aac", rate=8000) if sound else None
        for number, time in zip(range(frames), times or range(frames), strict=True):
            frame = av.VideoFrame.from_ndarray(picture(number, width, height), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, fps)
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        if audio is not None:
            _mux_silence(file, audio, sound)
    return path


def make_sound(path: Path) -> Path:
    """Writes a file with a second of sound and no picture."""
    with av.open(str(path), "w") as container:
        _mux_silence(container, container.add_stream("aac", rate=8000), 1.0)
    return path


def _mux_silence(container: Any, stream: AudioStream, seconds: float) -> None:
    for start in range(0, int(8000 * seconds), 1024):
        frame = AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 8000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
