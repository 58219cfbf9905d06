"""Reader of the frame shown at a time in a video file; it seeks where that saves decoding."""

from __future__ import annotations  # PyAV's Packet takes its parameter in stubs only

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from re2tal.videos import cuts
from re2tal.videos.frame_queue import FrameQueue, Shown, lacks_times
from re2tal.videos.limits import Deadline, FrameError, Limits, VideoError

# Path of a local file, content of a file, or open seekable file.
Source = str | Path | bytes | BinaryIO

# Seconds for which the last frame stays after its end, unless the file was cut off: the durations
# in containers and annotations include the sound, which often outlasts the picture.
TAIL = 1.0

# Containers whose claimed duration may count from second 0 of their clock, before the first frame:
# the first chunks of an AVI may be empty because of the encoder's delay.
_FROM_ZERO = frozenset({"mov", "avi"})

# Containers whose headers hold the duration of the picture itself, apart from the sound.
_OWN_DURATION = frozenset({"mov", "avi", "ivf"})

# Number of frames by which the claimed duration may be too long in a complete file.
_MOST_MISSING = 0.5

# Allowed formats. FFmpeg also reads playlists, subtitles, text art and network streams, and decides
# by content: a text file named .mp4 must not make it open other files.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,h264,hevc,m4v,ivf,flv,ogg,asf"

# MPEG program streams have few time stamps, and after a seek FFmpeg's guesses in between are wrong.
# Raw streams have none.
_RAW = frozenset({"h264", "hevc", "mpegvideo", "m4v"})
_UNSEEKABLE = _RAW | {"mpeg"}

# Factor of FFmpeg's limit of pixels: it counts the padding of pictures, which is large for small
# pictures.
_PADDED = 4

# Tolerance for rounding of times, in seconds.
_ROUNDING = 1e-6

# `Span.damage` of a part that is missing in the file.
CUT = "the file was cut off"

# Frames by which a decoder may output a key frame late.
_MOST_LATE = 16

# Seconds before a target at which a key frame is searched, one after the other.
_STEPS_BACK = (0.0, 1.0, 4.0, 16.0)


class Span(NamedTuple):
    """Frame and the time for which it is on screen.

    Attributes:
        begin: tick at which the frame appears, in units of `VideoReader.stream.time_base` seconds,
            counted from the first frame of the video.
        end: tick at which the frame disappears.
        frame: decoded frame.
        damage: damage of the frame, or of a lost frame before `end`; else empty.
    """

    begin: int
    end: int
    frame: VideoFrame
    damage: str


class VideoReader:
    """Reader of the frames of one video file by presentation time, counted from its first frame.

    A context manager: the file is closed on leaving.

    Args:
        source: path, content, or open binary file of the video.
        threads: decoding threads.
        limits: limits of the cost; the time counts from construction.
        times: seconds of all later calls of `frame_at`, rising, if they are known; other frames may
            then be skipped.

    Raises:
        VideoError: the file cannot be opened as a video, or exceeds the limits.
    """

    name: str
    container: InputContainer
    stream: VideoStream
    ordered: bool | None  # true if frames are shown in the decoder's order; None until known
    _queue: FrameQueue  # next frames of the decoder
    _shown: Shown | None  # the frame removed from the queue last

    def __init__(
        self,
        source: Source,
        *,
        threads: int = 1,
        limits: Limits | None = None,
        times: Sequence[float] | None = None,
    ) -> None:
        self.name = _name(source)
        self._source = source
        self._threads = threads
        self._times = times
        self._targets: list[int] | None = None  # `times` as time stamps of the stream
        self._limits = limits or Limits()
        self._deadline = Deadline(self.name, self._limits)
        self.ordered = None
        self._open()
        # `_longest_gop` and `_early` are learned from past seeks, so that later seeks do not repeat
        # much decoding.
        self._longest_gop = int(1 / self._tick)  # ticks from a key frame to a target
        self._cut: str | None = None  # sign that the file was cut off, empty if none; None: unknown
        self._sought_key: int | None = None  # result of `_safe_key` at the last seek
        self._early = 0  # ticks by which seeks land before the key frame in the index

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        del self._queue
        self._shown = None
        self.container.close()

    @property
    def start(self) -> float:
        """Presentation time of the first frame, in seconds of the file's clock."""
        return self._start * self._tick

    @property
    def lateness(self) -> float:
        """Seconds from the start of the file to the first picture."""
        return cuts.lateness(self.container, self.start)

    @property
    def claimed(self) -> float | None:
        """Duration in the header in seconds, which may include sound; None if there is none."""
        if self.container.format.name in _RAW:
            return None
        return cuts.claimed_seconds(self.container, self.stream, self.start)

    def cut_off(self, end: float) -> str:
        """Describe a sign that the file was cut off; return "" if it is complete.

        Args:
            end: second at which the last frame in the file ends.
        """
        if self._cut is None:
            self._cut = ""
            if self._lacks(end):
                self._cut = f", though its header says {self.claimed:.2f}: {CUT}"
            elif self._stops_midway():
                self._cut = f": {CUT}"
        return self._cut

    def _lacks(self, end: float) -> bool:
        """Tell if the header claims a longer duration than the file holds."""
        claimed, missing = self.claimed, _MOST_MISSING * self._usual + _ROUNDING
        if self.ordered or not _FROM_ZERO.isdisjoint(self.container.format.name.split(",")):
            missing += self.start
        if claimed is None or claimed - end <= missing:
            return False
        if not _OWN_DURATION.isdisjoint(self.container.format.name.split(",")):
            return True
        claimed += self.lateness  # from the start of the file, as for the sound
        with self._second_look() as container:
            return cuts.lacks_sound(container, self.stream, claimed, self._deadline)

    def _stops_midway(self) -> bool:
        """Tell if the file ends inside a packet, box or chunk."""
        file = self._file()
        if not isinstance(file, str):
            return cuts.stops_midway(file, self.container)
        with Path(file.removeprefix("file:")).open("rb") as opened:
            return cuts.stops_midway(opened, self.container)

    @contextmanager
    def _second_look(self) -> Iterator[InputContainer]:
        """Open the file a second time, and restore the position of a shared source."""
        shared = None if isinstance(self._source, str | Path | bytes) else self._source
        place = 0 if shared is None else shared.tell()
        try:
            with self._open_container() as container:
                yield container
        finally:
            if shared is not None:
                shared.seek(place)

    @property
    def seekable(self) -> bool:
        """Tell if frames can be found without decoding all frames before them."""
        return self.container.format.name not in _UNSEEKABLE

    def packet_time(self, packet: Packet[VideoStream]) -> float | None:
        """Return the second at which a packet's frame is presented.

        If frames are shown in the decoder's order, this is the time of the frame that comes out
        with the packet.
        """
        time = packet.dts if packet.pts is None or self.ordered else packet.pts
        origin = self._clock if self.ordered else self._start
        return None if time is None else (time - origin) * self._tick

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """Yield the following packets without decoding; no frames can be read afterwards.

        Raises:
            VideoError: the rest of the file cannot be read, or the video exceeds the limits.
        """
        return self._queue.packets()

    def seek_packets(self, seconds: float) -> bool:
        """Seek to packets near a time; return False if the seek fails."""
        try:
            self.container.seek(int(seconds / self._tick) + self._clock, stream=self.stream)
        except av.FFmpegError:
            return False
        self._restart_decoding()
        return True

    def frame_at(self, seconds: float) -> VideoFrame:
        """Return the frame on screen at a time: the last one presented by then.

        The first frame also covers times up to one frame before it, and the last frame times up to
        `TAIL` seconds after it.

        Args:
            seconds: time, not before that of the previous call: the reader only moves forward.

        Raises:
            FrameError: the video shows nothing at that time, or is damaged there; calls with later
                times are still possible.
            VideoError: the rest of the video cannot be read, or it exceeds the limits.
        """
        target = self._ticks(seconds)
        if self._seeking_pays(target):
            self._seek(target)
        while (ahead := self._queue.peek()) is not None and self._time(ahead) <= target:
            self._shown = ahead
            self._queue.pop()
        shown = self._shown or ahead
        if shown is None:
            reason = self._queue.reason
            raise VideoError(self.name, f"no frame of it can be decoded{reason and ': '}{reason}")
        begin, end = self._time(shown) * self._tick, self._end(shown)
        if self._shown is None and seconds < 2 * begin - end:  # more than a frame before the first
            reason = f"shows nothing at second {seconds:.2f}: it begins at {begin:.2f}"
            raise FrameError(self.name, reason)
        # a raw stream has no sound that could outlast the picture
        tail = 0.0 if self.container.format.name in _RAW else TAIL
        if ahead is None and seconds > end + tail + _ROUNDING:
            raise FrameError(self.name, self._too_late(seconds, end))
        self._check_intact(shown, target)
        if seconds > end + self._tick and self._lack_behind(shown):
            raise FrameError(self.name, self._too_late(seconds, end))
        return shown.frame

    def frames(self) -> Iterator[Span]:
        """Yield all following frames in presentation order, each once.

        `frame_at` returns the same frame at every time from `begin` to before `end`, and fails
        somewhere between them if the frame is damaged. A missing part of a truncated file is a span
        with the previous frame and with `CUT` as damage.

        Raises:
            VideoError: the rest of the video cannot be read, or it exceeds the limits.
        """
        end: int | None = None
        while (shown := self._queue.peek()) is not None:
            self._queue.pop()
            following = self._queue.peek()
            # spans must not overlap, even if a time stamp goes back
            begin = self._time(shown) if end is None else max(end, self._time(shown))
            own = max(begin + 1, round(self._end(shown) / self._tick))
            end = own if following is None else max(begin, self._time(following))
            damaged = self._queue.is_damaged(shown, end - 1 + self._start)
            lacking = self._lack_behind(shown)
            if lacking and following is None:
                end = max(end, round((self.claimed or 0.0) / self._tick))
            shown_to = min(own, end) if lacking and end - own > 1 else end
            if end > begin:  # else the next frame replaces it at once
                reason = self._queue.reason if damaged else ""
                yield Span(begin=begin, end=shown_to, frame=shown.frame, damage=reason)
            if end > shown_to:
                yield Span(begin=shown_to, end=end, frame=shown.frame, damage=CUT)

    def _lack_behind(self, shown: Shown) -> bool:
        """Tell if frames after a frame may be missing because the file was cut off.

        Gaps may lie between the last frames of a file too: frames are stored in decoding order, so
        a stored frame may be shown after a missing one.
        """
        if not self._queue.ended:
            return False
        return bool(self.cut_off(self._end(self._queue.last or shown)))

    def _check_intact(self, shown: Shown, target: int) -> None:
        """Raise FrameError if a frame, or a lost one between it and a tick, is damaged."""
        if self._queue.is_damaged(shown, target + self._start):
            second = max(self._time(shown), target) * self._tick
            reason = f"the frame at second {second:.2f} is damaged: {self._queue.reason}"
            raise FrameError(self.name, reason)

    def _open(self) -> None:
        """Open the file, or open it again at its start."""
        self.container = self._open_container()
        try:
            self._set_up()
        except (VideoError, av.FFmpegError) as error:
            self.container.close()
            if isinstance(error, VideoError):
                raise
            raise VideoError(self.name, f"cannot be decoded: {error.strerror}") from error

    def _open_container(self) -> InputContainer:
        """Open the file."""
        file = self._file()
        if not isinstance(file, str):
            file.seek(0)
        try:
            return av.open(
                file,
                mode="r",
                container_options={"format_whitelist": _FORMATS},
                options={"max_pixels": str(_PADDED * self._limits.pixels)},
                metadata_errors="replace",
                timeout=self._limits.seconds,
            )
        except (av.FFmpegError, OSError) as error:
            self._deadline.check()  # which also interrupts reading
            reason = error.strerror or str(error)
            raise VideoError(self.name, f"cannot be opened as a video: {reason}") from error

    def _set_up(self) -> None:
        """Choose the stream, set its decoder up and find the time of its first frame."""
        self.stream = self._choose_stream()
        decoder = self.stream.codec_context
        self._limits.check_picture(self.name, decoder.width, decoder.height)
        decoder.options = {"max_pixels": str(_PADDED * self._limits.pixels)}
        self.stream.thread_count = self._threads
        self.stream.thread_type = "AUTO"
        self._tick = float(self.stream.time_base or 1)
        self._start = self.stream.start_time or 0
        if self._times is not None:
            self._targets = [self._start + self._ticks(time) for time in self._times]
        if lacks_times(self.container, self.stream):
            self.ordered = True
        self._restart_decoding()
        if self.ordered is None:
            if self._queue.may_hide_reordering():
                self.ordered = self._queue.reorders()
                self.container.close()
                self._open()
                return
            self.ordered = False
        # AVI counts from the first stored frame, which is some frames before the first shown one
        by_order = self.ordered or self.container.format.name == "avi"
        if by_order or self.stream.start_time is None:
            first = self._queue.peek()
            if first is not None and self._queue.reason:
                raise VideoError(
                    self.name, "its first frame is damaged, from which its times count"
                )
            self._start += 0 if first is None else self._time(first)
        self._clock = (self.stream.start_time or 0) if self.ordered else self._start

    def _file(self) -> str | BinaryIO:
        """Return the source in the form that FFmpeg opens."""
        if isinstance(self._source, bytes):
            return io.BytesIO(self._source)
        if isinstance(self._source, str | Path):
            path = Path(self._source)
            if not path.is_file():
                there = path.exists()
                raise VideoError(self.name, "is not a file" if there else "there is no such file")
            if path.stat().st_size == 0:
                raise VideoError(self.name, "is empty (zero bytes)")
            return f"file:{path}"  # else FFmpeg takes a name like "http:x" for an address
        return self._source

    def _choose_stream(self) -> VideoStream:
        """Return the first video stream that is not a cover picture."""
        for stream in self.container.streams.video:
            if not stream.disposition & Disposition.attached_pic:
                if not _has_decoder(stream):
                    raise VideoError(self.name, "its codec is not supported")
                return stream
        raise VideoError(self.name, "holds no video stream, only other streams such as sound")

    def _restart_decoding(self) -> None:
        """Drop all frames; decoding continues at the current position of the file."""
        self._shown = None
        self._queue = FrameQueue(
            self.name,
            self.container,
            self.stream,
            self._deadline,
            self._targets,
            ordered=bool(self.ordered),
            is_cut=self._stops_midway,
        )

    def _ticks(self, seconds: float) -> int:
        """Convert a time to ticks; a time that precedes a frame by rounding only is the frame's."""
        return int((seconds + _ROUNDING) // self._tick)

    def _time(self, shown: Shown) -> int:
        """Return a frame's presentation time, in ticks from the start of the video."""
        return shown.time - self._start

    def _end(self, shown: Shown) -> float:
        """Return the second at which a frame ends if no other frame follows."""
        ticks = 0 if self.ordered else shown.frame.duration
        return self._time(shown) * self._tick + (ticks * self._tick or self._usual)

    @property
    def _usual(self) -> float:
        """Usual duration of a frame in seconds, by the header."""
        rate = self.stream.guessed_rate
        return 1 / float(rate) if rate else 0.0

    def _too_late(self, seconds: float, end: float) -> str:
        """Explain why there is no frame at a time after the last frame."""
        reason = f"shows nothing at second {seconds:.2f}: its last frame ends at {end:.2f}"
        return reason + self.cut_off(end)

    def _seeking_pays(self, target: int) -> bool:
        """Tell if a seek is likely to land after the frame decoded last, and before the target."""
        if not self.seekable:
            return False
        if self._queue.shifted:
            return self._safe_key(target) != self._sought_key
        last = self._queue.position or self._shown
        position = 0 if last is None else self._time(last)
        if target <= position:
            return False
        key = self._indexed_key(target)
        landing = target - self._longest_gop if key is None else key - self._early
        return landing > position

    def _indexed_key(self, target: int) -> int | None:
        """Look up the approximate tick of a target's key frame; None without an index."""
        index = self.stream.index_entries
        if not len(index):
            return None
        # an index holds decoding times, which differ from presentation times by about a constant
        first = index[0].timestamp
        if index[len(index) - 1].timestamp - first < target:
            return None
        key = index.search_timestamp(target + first)
        return index[key].timestamp - first if key >= 0 else None

    def _safe_key(self, target: int) -> int | None:
        """Look up a target's key frame, or the previous one if that comes out after the target."""
        delay = _MOST_LATE * self._queue.step if self.ordered else self._queue.delay
        return self._indexed_key(target - delay)

    def _seek(self, target: int) -> None:
        """Seek to the nearest key frame at or before the target that can be found."""
        self._sought_key = self._safe_key(target)
        key = self._indexed_key(target)
        places = [target - int(seconds / self._tick) for seconds in _STEPS_BACK]
        if key is not None:
            places.insert(1, key - 1)  # some files also mark the packet after a key frame as one
        for wanted in places:
            if wanted > 0 and (landed := self._land(wanted, target)) is not None:
                self._longest_gop = max(self._longest_gop, target - landed)
                if key is not None:
                    self._early = max(self._early, key - landed)
                return
        # the last resort, which every file allows: its start
        self._longest_gop = max(self._longest_gop, target)
        self.container.close()
        self._open()

    def _land(self, wanted: int, target: int) -> int | None:
        """Seek, and return the time of the next frame; None if it is past the target."""
        try:
            self.container.seek(wanted + self._clock, stream=self.stream)
        except av.FFmpegError:
            return None
        self._restart_decoding()
        # FFmpeg outputs no frame with references from before the seek
        next_frame = self._queue.peek()
        if next_frame is None or not self._queue.is_at_key or self._time(next_frame) > target:
            return None
        return self._time(next_frame)


def _name(source: Source) -> str:
    """Return the name of a video in errors."""
    if isinstance(source, bytes):
        return f"a video of {len(source)} bytes"
    if not isinstance(source, str | Path) and not hasattr(source, "read"):
        raise TypeError(
            "A video is a path, its content as bytes or an open binary file, not an object of the "
            f"class {type(source).__name__}."
        )
    return str(source if isinstance(source, str | Path) else getattr(source, "name", "a stream"))


def _has_decoder(stream: VideoStream) -> bool:
    """Tell if this FFmpeg can decode the stream; PyAV's types assume that it always can."""
    return getattr(stream, "codec_context", None) is not None
