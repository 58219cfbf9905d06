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

# Greatest duration of one frame at a fixed rate, in seconds: a damaged time stamp years ahead must
# not fill the disk.
_LONGEST_STILL = 6 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TranscodeConfig:
    """Settings of transcoding.

    Attributes:
        size: short side in pixels, an even number; smaller videos are not enlarged. None keeps the
            size, except that odd sides lose one pixel.
        fps: frames per second; None keeps every frame at its own time. Frame k, shown from second
            k / fps on, is the source's frame at (k + 0.5) / fps. A `TimeGrid` of this rate without
            an offset samples exactly these frames.
        quality: x264's constant rate factor; higher is smaller and noisier.
        gop: greatest number of frames from one key frame to the next; it bounds the frames that a
            reader must decode before the one it wants.
        piece_seconds: seconds of video per file; None puts the whole video into one file.

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
        start: second of the video at which the piece starts, and from which its own times count.
            Its first frame is the one on screen then.
        end: second of the video at which the piece ends.
        frames: number of frames that appear in the piece.
        width: width in pixels, upright.
        height: height in pixels, upright.
        source: width and height of the source, upright.
        video: H.264 mp4; empty if the source is damaged there.
        damage: description of the source's damage there, else empty.
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
    """Encode a video again, piece by piece, in one pass and in bounded memory.

    The frames are upright. Their time stamps are exact, in ticks of the source or, at a fixed rate,
    in frames. So the pieces show the same frame as the source at every time. Pieces leave no gap
    from the first frame to the end of the last one. A stretch in which the source is damaged is a
    piece without frames.

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

    A piece starts at a multiple of `piece_seconds`, or where damage starts or ends.

    Attributes:
        frames: number of intact frames in all pieces so far.
        damage: description of the source's damage in the current piece, else empty.
    """

    def __init__(self, config: TranscodeConfig, tick: Fraction, rate: Fraction) -> None:
        self._config, self._tick, self._rate = config, tick, rate
        self._scale = _Scaler(config.size)
        self._start: int | None = None  # first tick of the current piece
        self._encoder: Encoder | None = None
        self._last: VideoFrame | None = None
        self._before = 0  # number of frames in the finished pieces
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
                self._encode(self._last, border)  # the previous frame is still on screen
        if not span.damage:
            self._last = self._scale(span.frame)
            self._encode(self._last, span.begin)
            self.frames += 1

    def finish(self, end: int) -> Piece:
        """End the piece and its last frame at tick `end`."""
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
        """Return the last tick, up to `time`, at which a piece may start."""
        if self._config.piece_seconds is None:
            return 0
        seconds = Fraction(self._config.piece_seconds)
        # half a tick more, because a border is rounded to a tick and may lie before its multiple
        number = (time * self._tick + self._tick / 2) // seconds
        border = round(number * seconds / self._tick)
        return border if border <= time else round((number - 1) * seconds / self._tick)


def _resampled(spans: Iterator[Span], tick: Fraction, rate: Fraction, name: str) -> Iterator[Span]:
    """Yield the frames at a fixed rate: frame k is on screen at second (k + 0.5) / rate."""
    count, span = 0, None
    for span in spans:
        if (span.end - span.begin) * tick > _LONGEST_STILL:
            second = float(span.begin * tick)
            raise VideoError(name, f"shows one frame for hours, from second {second:.2f} on")
        for number in range(_first(span.begin * tick, rate), _first(span.end * tick, rate)):
            yield span._replace(begin=number, end=number + 1)
            count += 1
    if span is not None and not count:  # a video shorter than half a frame still has one
        yield span._replace(begin=0, end=1)


def _first(second: Fraction, rate: Fraction) -> int:
    """Return the first frame whose middle is not before `second`, up to the reader's rounding."""
    return max(0, math.ceil((second - Fraction(1, 1_000_000)) * rate - Fraction(1, 2)))


def _kind(damage: str) -> str:
    """Return the kind of a piece: intact, damaged or missing."""
    return damage if damage in ("", CUT) else "damaged"


class _Scaler:
    """Converter of frames to upright yuv420p frames of the size fixed by the first frame.

    Attributes:
        source: width and height of the first frame, upright.
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
            # YUV frames keep their colour space, which the encoder writes into the file
            dst_colorspace=Colorspace.ITU601 if red_green_blue else None,
            dst_color_range=ColorRange.MPEG if red_green_blue else None,
            interpolation=Interpolation.BICUBIC,
            threads=1,
        )
        return _turned(picture, quarters(frame))


def _even(width: int, height: int, size: int | None) -> tuple[int, int]:
    """Return even width and height with a short side of at most `size`."""
    short = min(width, height)
    if size is None or short <= size:
        return max(2, width - width % 2), max(2, height - height % 2)
    width, height = (max(2, 2 * round(side * size / short / 2)) for side in (width, height))
    return width, height


def _turned(picture: VideoFrame, turns: int) -> VideoFrame:
    """Rotate a yuv420p picture by quarter turns, counterclockwise."""
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
    """Set the colour space of a picture to that of another."""
    picture.colorspace, picture.color_range = other.colorspace, other.color_range
    picture.color_trc, picture.color_primaries = other.color_trc, other.color_primaries
    return picture
