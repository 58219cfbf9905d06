"""Transcoding for random access: short groups of pictures, fewer pixels, videos in pieces."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from re2tal.videos.conversion import quarters
from re2tal.videos.encoding import Encoder
from re2tal.videos.limits import VideoError
from re2tal.videos.reader import CUT, Span, VideoReader

# Seconds for which one frame may be repeated at a fixed rate: a damaged time stamp years ahead must
# not fill a disk.
_LONGEST_STILL = 6 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TranscodeConfig:
    """Settings with which a video is encoded anew.

    Attributes:
        size: pixels of the short side, an even number; smaller videos are not enlarged. None keeps
            the size, except that a side of an odd number of pixels loses one.
        fps: frames per second; None keeps every frame, at its own time. Frame k, from second k /
            fps on, is the source's frame at (k + 0.5) / fps: at this rate and without an offset, a
            `TimeGrid` samples exactly these.
        quality: x264's constant rate factor; higher is smaller and noisier.
        gop: largest number of frames from one key frame to the next, which bounds the frames that a
            reader decodes in vain before the one it wants.
        piece_seconds: seconds of video in a file; None puts all of a video into one.

    Raises:
        ValueError: a field is out of its range.
    """

    size: int | None = 256
    fps: float | None = None
    quality: int = 23
    gop: int = 32
    piece_seconds: float | None = 60.0

    def __post_init__(self) -> None:
        if self.size is not None and (self.size < 16 or self.size % 2):
            raise ValueError(f"size must be an even number of at least 16, not {self.size}.")
        if not 0 <= self.quality <= 51:
            raise ValueError(f"quality must be from 0 to 51, not {self.quality}.")
        if self.gop < 1:
            raise ValueError(f"gop must be at least 1, not {self.gop}.")
        for name, least in (("fps", 0.01), ("piece_seconds", 1.0)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise ValueError(f"{name} must be a number from {least} on, not {value}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Stretch of a video as a file of its own.

    Attributes:
        start: second of the video at which it starts; its own times count from there. Its first
            frame is the one on screen then.
        end: second of the video at which it ends.
        frames: number of frames that appear in it.
        width: pixels across, upright.
        height: pixels down.
        source: width and height of the source, upright.
        video: H.264 mp4; empty if the source is damaged there.
        damage: fault of the source there, else empty.
    """

    start: float
    end: float
    frames: int
    width: int
    height: int
    source: tuple[int, int]
    video: bytes
    damage: str = ""


def transcode(reader: VideoReader, config: TranscodeConfig) -> Iterator[Piece]:
    """Encode a video anew, piece after piece, in one pass and in bounded memory.

    The frames are upright. Their time stamps are exact: in the unit of the source's or, at a fixed
    rate, in frames; so at every time the pieces show the same frame as the source. Pieces lie
    without a gap from the first frame to the end of the last one. A stretch in which the source is
    damaged is a piece without frames.

    Args:
        reader: reader of the video, at its start.
        config: settings of the encoding.

    Raises:
        VideoError: the video cannot be read to its end, or none of its frames is intact.
    """
    tick, spans = Fraction(reader.stream.time_base or 1), reader.frames()
    rate = reader.stream.average_rate or reader.stream.guessed_rate or Fraction(25)
    if config.fps is not None:
        rate = Fraction(config.fps).limit_denominator(1001)
        tick, spans = 1 / rate, _resampled(spans, tick, rate, reader.name)
    cutter, end = _Cutter(config, tick, rate), 0
    for span in spans:
        yield from cutter.add(span)
        end = span.end
    if not cutter.frames:
        reason = f": {cutter.damage}" if cutter.damage else ""
        raise VideoError(reader.name, f"no frame of it can be decoded{reason}")
    yield cutter.finish(end)


class _Cutter:
    """Distributor of frames to pieces.

    A piece starts at a multiple of a fixed number of seconds, and where damage starts or ends.

    Attributes:
        frames: number of intact frames in all pieces so far.
        damage: fault of the source in the current piece, else empty.
    """

    def __init__(self, config: TranscodeConfig, tick: Fraction, rate: Fraction) -> None:
        self._config, self._tick, self._rate = config, tick, rate
        self._scale = _Scaler(config.size)
        self._start: int | None = None  # of the current piece
        self._encoder: Encoder | None = None
        self._last: VideoFrame | None = None
        self._before = 0  # frames of the finished pieces
        self.frames, self.damage = 0, ""

    def add(self, span: Span) -> Iterator[Piece]:
        """Take the next frame, and yield the piece that ends before it."""
        border = self._border(span.begin)
        if self._start is None:
            self._start, self.damage = span.begin, span.damage
        elif _kind(span.damage) != _kind(self.damage):
            yield self.finish(span.begin)
            self._start, self.damage = span.begin, span.damage
        elif border > self._start:
            yield self.finish(border)
            self._start = border
            if border < span.begin and not self.damage:
                assert self._last is not None
                self._encode(self._last, border)  # it is still on screen
        if not span.damage:
            self._last = self._scale(span.frame)
            self._encode(self._last, span.begin)
            self.frames += 1

    def finish(self, end: int) -> Piece:
        """End the piece, and with it its last frame."""
        assert self._start is not None
        encoder, self._encoder = self._encoder, None
        last = self._last if encoder else None
        frames, self._before = self.frames - self._before, self.frames
        return Piece(
            start=float(self._start * self._tick),
            end=float(end * self._tick),
            frames=frames,
            width=last.width if last else 0,
            height=last.height if last else 0,
            source=self._scale.source,
            video=encoder.finish(end - self._start) if encoder else b"",
            damage=self.damage,
        )

    def _encode(self, frame: VideoFrame, time: int) -> None:
        config = self._config
        if self._encoder is None:
            self._encoder = Encoder(
                frame, tick=self._tick, rate=self._rate, quality=config.quality, gop=config.gop
            )
        assert self._start is not None
        self._encoder.add(frame, time - self._start)

    def _border(self, time: int) -> int:
        """Last tick, up to a time, at which a piece may start."""
        if self._config.piece_seconds is None:
            return 0
        seconds = Fraction(self._config.piece_seconds)
        number = (time * self._tick + self._tick / 2) // seconds
        border = round(number * seconds / self._tick)
        return border if border <= time else round((number - 1) * seconds / self._tick)


def _resampled(spans: Iterator[Span], tick: Fraction, rate: Fraction, name: str) -> Iterator[Span]:
    """Yield as frame k the one on screen in its middle, (k + 0.5) / rate."""
    count, span = 0, None
    for span in spans:
        if (span.end - span.begin) * tick > _LONGEST_STILL:
            second = float(span.begin * tick)
            raise VideoError(name, f"shows one frame for hours, from second {second:.2f} on")
        for number in range(_first(span.begin * tick, rate), _first(span.end * tick, rate)):
            yield span._replace(begin=number, end=number + 1)
            count += 1
    if span is not None and not count:  # a video shorter than half a frame still shows one
        yield span._replace(begin=0, end=1)


def _first(second: Fraction, rate: Fraction) -> int:
    """First frame whose middle is not before a second; as in the reader, except for rounding."""
    return max(0, math.ceil((second - Fraction(1, 1_000_000)) * rate - Fraction(1, 2)))


def _kind(damage: str) -> str:
    """Kind of a piece: intact, damaged or missing."""
    return damage if damage in ("", CUT) else "damaged"


class _Scaler:
    """Converter of frames to upright ones of the size fixed by the first.

    Attributes:
        source: width and height of the first one, upright.
    """

    def __init__(self, size: int | None) -> None:
        self._size = size
        self.source = (0, 0)
        self._shape: tuple[int, int] | None = None
        self._reformatter = VideoReformatter()
        self._frame: VideoFrame | None = None
        self._picture: VideoFrame | None = None

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        if self._picture is None or frame is not self._frame:
            self._frame, self._picture = frame, self._convert(frame)
        return self._picture

    def _convert(self, frame: VideoFrame) -> VideoFrame:
        if self._shape is None:
            self._shape = _even(frame.width, frame.height, self._size)
            turned = quarters(frame) % 2
            self.source = (frame.height, frame.width) if turned else (frame.width, frame.height)
        red_green_blue = frame.format.is_rgb
        picture = self._reformatter.reformat(
            frame,
            width=self._shape[0],
            height=self._shape[1],
            format="yuv420p",
            # all others keep their colour space, which the encoder writes down
            dst_colorspace=Colorspace.ITU601 if red_green_blue else None,
            dst_color_range=ColorRange.MPEG if red_green_blue else None,
            interpolation=Interpolation.BICUBIC,
            threads=1,
        )
        return _turned(picture, quarters(frame))


def _even(width: int, height: int, size: int | None) -> tuple[int, int]:
    """Width and height once the short side is at most `size`, both even."""
    short = min(width, height)
    if size is None or short <= size:
        return max(2, width - width % 2), max(2, height - height % 2)
    width, height = (max(2, 2 * round(side * size / short / 2)) for side in (width, height))
    return width, height


def _turned(picture: VideoFrame, turns: int) -> VideoFrame:
    """Turn a yuv420p picture by quarters, counterclockwise."""
    if not turns:
        return picture
    width, height = picture.width, picture.height
    values = picture.to_ndarray().reshape(-1)
    luma, blue, red = np.split(values, [width * height, width * height * 5 // 4])
    planes = [luma.reshape(height, width)]
    planes += [chroma.reshape(height // 2, width // 2) for chroma in (blue, red)]
    planes = [np.rot90(plane, turns) for plane in planes]
    turned = np.concatenate([plane.reshape(-1) for plane in planes])
    turned = turned.reshape(-1, planes[0].shape[1])
    return _like(VideoFrame.from_ndarray(turned, format="yuv420p"), picture)


def _like(picture: VideoFrame, other: VideoFrame) -> VideoFrame:
    """Give a picture the colour space of another."""
    picture.colorspace, picture.color_range = other.colorspace, other.color_range
    picture.color_trc, picture.color_primaries = other.color_trc, other.color_primaries
    return picture
