"""Writing of H.264 videos, at a fixed rate or with given presentation times."""

import io
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.container import OutputContainer
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

_EVERYWHERE = "cpu-independent=1"  # the option of x264 for equal bytes on every processor


def encode(
    target: Path | BinaryIO, frames: Iterable[np.ndarray], *, fps: int, quality: int = 30
) -> None:
    """Write frames as an H.264 mp4; the same frames give the same bytes.

    Args:
        target: path to write, or an open seekable file.
        frames: RGB pictures, uint8 `(H, W, 3)` with even H and W, all of one size.
        fps: frames per second.
        quality: x264's constant rate factor; higher is smaller and noisier, 30 shows its blocks.

    Raises:
        ValueError: there are no frames.
    """
    with av.open(target, "w", format="mp4") as container:
        stream = _add_stream(container, rate=Fraction(fps), quality=quality, gop=2 * fps)
        empty = True
        for picture in frames:
            if empty:
                stream.height, stream.width = picture.shape[:2]
                empty = False
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        if empty:
            raise ValueError("A video needs at least one frame.")
        container.mux(stream.encode())


class Encoder:
    """Encoder of frames with presentation times to an H.264 mp4 in memory.

    Groups of pictures are closed, so decoding can start at every key frame. The same frames and
    times give the same bytes.

    Args:
        first: first frame, which sets the format of all: yuv420p with even sides; its colour space
            is written to the file.
        tick: time base in seconds; time stamps are exact multiples of it.
        rate: approximate frames per second, used by the rate control only.
        quality: x264's constant rate factor.
        gop: greatest number of frames from one key frame to the next.
    """

    def __init__(
        self, first: VideoFrame, *, tick: Fraction, rate: Fraction, quality: int, gop: int
    ) -> None:
        self._file = io.BytesIO()
        self._container = av.open(self._file, "w", format="mp4")
        # without CABAC, deblocking and the like: 8 % larger, decoded 1.7 times as fast
        self._stream = stream = _add_stream(
            self._container, rate=rate, quality=quality, gop=gop, tune="fastdecode"
        )
        stream.width, stream.height = first.width, first.height
        context = stream.codec_context
        context.time_base = tick
        context.colorspace, context.color_range = first.colorspace, first.color_range
        context.color_trc, context.color_primaries = first.color_trc, first.color_primaries
        self._tick = tick
        self._times: list[int] = []
        self._held: list[tuple[VideoFrame, int]] = []  # the last frames, not yet encoded
        self._packets: list[Packet[VideoStream]] = []

    def add(self, frame: VideoFrame, time: int) -> None:
        """Add the next frame, of the same size and format as the first.

        Its presentation `time` is in ticks: 0 for the first frame, then rising.
        """
        self._times.append(time)
        self._held.append((frame, time))
        if len(self._held) > 2:
            self._encode(*self._held.pop(0), PictureType.NONE)

    def finish(self, end: int) -> bytes:
        """End the video at tick `end`, when the last frame leaves the screen; return the file."""
        # mp4 stores durations in decoding order, so the last frame keeps its duration only if it is
        # decoded last. Therefore the last frames become P-frames, not B-frames.
        for frame, time in self._held:
            self._encode(frame, time, PictureType.P if time else PictureType.NONE)
        self._packets += self._stream.encode(None)
        ends = dict(zip(self._times, [*self._times[1:], end], strict=True))
        for packet in self._packets:
            assert packet.pts is not None
            packet.duration = ends[packet.pts] - packet.pts
            self._container.mux(packet)
        self._container.close()
        return self._file.getvalue()

    def _encode(self, frame: VideoFrame, time: int, kind: PictureType) -> None:
        # a source's picture type, or an earlier time of the same picture, must not remain
        frame.pts, frame.time_base, frame.pict_type = time, self._tick, kind
        self._packets += self._stream.encode(frame)


def _add_stream(
    container: OutputContainer, *, rate: Fraction, quality: int, gop: int, **options: str
) -> VideoStream:
    stream = container.add_stream("libx264", rate=rate)
    stream.pix_fmt = "yuv420p"
    # one thread, because x264's output depends on the number of threads
    stream.thread_count = 1
    settings = {"crf": str(quality), "preset": "veryfast", "g": str(gop), **options}
    stream.options = {**reproducible(settings)}
    return stream


def reproducible(options: Mapping[str, str]) -> dict[str, str]:
    """Add to libx264's `options` (FFmpeg's names) the option for equal bytes on every processor.

    Without it, x264's AVX-512 code gives other bytes than its AVX2 code, on some processors even
    other bytes from run to run. The option restricts x264 to operations that round alike.
    """
    own = options.get("x264-params")
    return {**options, "x264-params": f"{own}:{_EVERYWHERE}" if own else _EVERYWHERE}
