"""An open video file that gives the frame shown at a time, seeking where that saves decoding."""

import io
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

# What a video may be given as: the path of a local file, its content, or an open seekable file.
Source = str | Path | bytes | BinaryIO

# Seconds for which the last frame stands in after it ended: the durations of containers and of
# annotations count the sound, which often outlasts the picture a little.
TAIL = 1.0

# FFmpeg also reads playlists, subtitles, text art and network streams, and takes a file for what
# its content looks like: a text named .mp4 must not make it open other files.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,h264,hevc,ivf,flv,ogg,asf"

# MPEG program streams give few time stamps: after a seek FFmpeg guesses those in between, wrongly.
_UNSEEKABLE = frozenset({"mpeg"})

# Seconds back from a target at which a key frame is looked for, one after the other.
_STEPS_BACK = (0.0, 1.0, 4.0, 16.0)


class VideoError(Exception):
    """A video that cannot be used: `source` says which one, `reason` why."""

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(source, reason)  # these args let the error travel between processes

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class VideoReader:
    """The frames of one video file by presentation time, which counts from its first frame.

    A context manager: the file is closed on leaving.

    Args:
        source: The video.
        threads: Decoding threads.

    Raises:
        VideoError: The file cannot be opened as a video.
    """

    name: str
    container: InputContainer
    stream: VideoStream
    _frames: Iterator[VideoFrame]  # what comes next out of the decoder
    _shown: VideoFrame | None  # the last frame gone past
    _shown_intact: bool  # whether neither it nor a frame that it may lean on is damaged
    _ahead: VideoFrame | None  # the one after it, once it is decoded
    _ahead_intact: bool

    def __init__(self, source: Source, *, threads: int = 1) -> None:
        self.name = _name(source)
        self._source = source
        self._threads = threads
        self._open()
        # Both are learned while seeking, so that no seek goes back over what is decoded for long:
        self._longest_gop = int(1 / self._tick)  # ticks from a key frame to a target
        self._early = 0  # ticks by which seeks land before the key frame that the index names

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
        """Closes the file."""
        self._shown = self._ahead = None
        self._frames = iter(())
        self.container.close()

    def frame_at(self, seconds: float) -> VideoFrame:
        """The frame on screen at a time: the last one that is presented by then.

        The first frame also stands for times up to one frame before it, the last one for up to
        `TAIL` seconds after it.

        Args:
            seconds: The time; not before that of the call before, as the reader moves forward.

        Raises:
            VideoError: The video shows nothing at that time, or it is damaged there.
        """
        try:
            return self._frame_at(seconds)
        except av.FFmpegError as error:
            reason = f"damaged near second {seconds:.2f}: {error.strerror}"
            raise VideoError(self.name, reason) from error

    def frames(self) -> Iterator[tuple[int, int, VideoFrame]]:
        """All frames that come next, in the order in which they are shown, each of them once.

        `frame_at` shows the same frame at every time from its first tick to before its last.

        Yields:
            The tick at which a frame comes on screen, that at which it leaves, and the frame. A
            tick is `stream.time_base` seconds; they count from the first frame of the video.

        Raises:
            VideoError: A frame is damaged.
        """
        end: int | None = None
        while True:
            try:
                frame, intact = self._peek(), self._ahead_intact
                self._ahead = None
                following = self._peek()
            except av.FFmpegError as error:
                raise VideoError(self.name, f"is damaged: {error.strerror}") from error
            if frame is None:
                return
            # a time stamp that goes back puts nothing on screen before it is reached
            begin = self._time(frame) if end is None else max(end, self._time(frame))
            if not intact:
                reason = f"the frame at second {begin * self._tick:.2f} is damaged"
                raise VideoError(self.name, reason)
            if following is not None:
                end = self._time(following)
            else:
                end = begin + max(1, round(self._frame_seconds(frame) / self._tick))
            if end > begin:  # else the next one takes its place before it was seen
                yield begin, end, frame
            end = max(begin, end)

    def _open(self) -> None:
        """Opens the file, or opens it again at its start."""
        try:
            self.container = av.open(
                self._file(),
                mode="r",
                container_options={"format_whitelist": _FORMATS},
                metadata_errors="replace",
            )
        except (av.FFmpegError, OSError) as error:
            reason = error.strerror or str(error)
            raise VideoError(self.name, f"cannot be opened as a video: {reason}") from error
        try:
            self._set_up()
        except (VideoError, av.FFmpegError) as error:
            self.container.close()
            if isinstance(error, VideoError):
                raise
            raise VideoError(self.name, f"cannot be decoded: {error.strerror}") from error

    def _set_up(self) -> None:
        """Chooses the stream, sets its decoder up and finds out when its first frame is shown."""
        self.stream = self._choose_stream()
        self.stream.thread_count = self._threads
        self.stream.thread_type = "AUTO"
        self._tick = float(self.stream.time_base or 1)
        self._start = self.stream.start_time or 0
        self._restart_decoding()
        # AVI counts from the first frame that is stored, some frames before the first one shown
        if self.container.format.name == "avi" and (first := self._peek()) is not None:
            self._start += self._time(first)

    def _file(self) -> str | BinaryIO:
        """What FFmpeg is given to open."""
        if isinstance(self._source, bytes):
            return io.BytesIO(self._source)
        if isinstance(self._source, str | Path):
            path = Path(self._source)
            if not path.is_file():
                there = path.exists()
                raise VideoError(self.name, "is not a file" if there else "there is no such file")
            if path.stat().st_size == 0:
                raise VideoError(self.name, "is empty (zero bytes)")
            return f"file:{path}"  # a name like "http:x" stays the name of a file
        self._source.seek(0)
        return self._source

    def _choose_stream(self) -> VideoStream:
        """The first stream of moving pictures."""
        for stream in self.container.streams.video:
            if not stream.disposition & Disposition.attached_pic:
                if not _has_decoder(stream):
                    raise VideoError(self.name, "its codec is not supported")
                return stream
        raise VideoError(self.name, "holds no video stream, only other streams such as sound")

    def _restart_decoding(self) -> None:
        """Forgets all frames; the next one comes from where the file now stands."""
        self._shown = self._ahead = None
        self._shown_intact = self._ahead_intact = True
        self._frames = self.container.decode(self.stream)

    def _frame_at(self, seconds: float) -> VideoFrame:
        # A time that lies before a frame only by rounding is meant to be that frame's.
        target = int((seconds + 1e-6) // self._tick)
        if self._seeking_pays(target):
            self._seek(target)
        while (ahead := self._peek()) is not None and self._time(ahead) <= target:
            self._shown, self._shown_intact, self._ahead = ahead, self._ahead_intact, None
        frame = self._shown or ahead
        if frame is None:
            raise VideoError(self.name, "no frame of it can be decoded")
        begin = self._time(frame) * self._tick
        end = begin + self._frame_seconds(frame)
        if self._shown is None and seconds < 2 * begin - end:
            reason = f"shows nothing at second {seconds:.2f}: it begins at {begin:.2f}"
            raise VideoError(self.name, reason)
        if ahead is None and seconds > end + TAIL:
            raise VideoError(self.name, self._too_late(seconds, end))
        if not (self._shown_intact if self._shown else self._ahead_intact):
            raise VideoError(self.name, f"the frame at second {begin:.2f} is damaged")
        return frame

    def _peek(self) -> VideoFrame | None:
        """The next frame, which stays next; None at the end of the video."""
        if self._ahead is None:
            self._ahead = frame = next(self._frames, None)
            if frame is not None:
                # damage is handed on from frame to frame until the next key frame
                self._ahead_intact = not frame.is_corrupt and (
                    self._ahead_intact or frame.key_frame
                )
        return self._ahead

    def _time(self, frame: VideoFrame) -> int:
        """When a frame is presented, in ticks since the start of the video."""
        # AVI has no presentation times; its frames are stored in the order in which they are shown
        time = frame.dts if frame.pts is None else frame.pts
        if time is None:
            raise VideoError(self.name, "its frames carry no times")
        return time - self._start

    def _frame_seconds(self, frame: VideoFrame) -> float:
        """For how long a frame is shown."""
        if frame.duration:
            return frame.duration * self._tick
        rate = self.stream.guessed_rate
        return 1 / float(rate) if rate else 0.0

    def _too_late(self, seconds: float, end: float) -> str:
        """Why there is no frame at a time after the last one."""
        reason = f"shows nothing at second {seconds:.2f}: its last frame ends at {end:.2f}"
        claimed = (self.stream.duration or 0) * self._tick
        return f"{reason}, though its header says {claimed:.2f}" if claimed > end + TAIL else reason

    def _seeking_pays(self, target: int) -> bool:
        """Whether a seek is likely to land behind the frame decoded last, and before the target."""
        last = self._ahead or self._shown
        position = 0 if last is None else self._time(last)
        if target <= position or self.container.format.name in _UNSEEKABLE:
            return False
        key = self._indexed_key(target)
        landing = target - self._longest_gop if key is None else key - self._early
        return landing > position

    def _indexed_key(self, target: int) -> int | None:
        """When about the key frame for a target is presented; None if the file has no index."""
        index = self.stream.index_entries
        if not len(index):
            return None
        # an index counts in decoding times, which run ahead of presentation times but alongside
        first = index[0].timestamp
        if index[len(index) - 1].timestamp - first < target:
            return None
        key = index.search_timestamp(target + first)
        return index[key].timestamp - first if key >= 0 else None

    def _seek(self, target: int) -> None:
        """Goes to a key frame at or before the target, the nearest one that the file can give."""
        key = self._indexed_key(target)
        for seconds in _STEPS_BACK:
            wanted = target - int(seconds / self._tick)
            if wanted > 0 and self._land(wanted, target):
                assert self._ahead is not None
                landed = self._time(self._ahead)
                self._longest_gop = max(self._longest_gop, target - landed)
                if key is not None:
                    self._early = max(self._early, key - landed)
                return
        # the one place that is found in every file is its start
        self._longest_gop = max(self._longest_gop, target)
        self.container.close()
        self._open()

    def _land(self, wanted: int, target: int) -> bool:
        """Seeks, and says whether the frame that comes next is not past the target."""
        try:
            self.container.seek(wanted + self._start, stream=self.stream)
        except av.FFmpegError:
            return False
        self._restart_decoding()
        # FFmpeg gives out no frame that leans on others from before the seek
        frame = self._peek()
        return frame is not None and self._time(frame) <= target


def _name(source: Source) -> str:
    """What errors call a video."""
    if isinstance(source, bytes):
        return f"a video of {len(source)} bytes"
    return str(source if isinstance(source, str | Path) else getattr(source, "name", "a stream"))


def _has_decoder(stream: VideoStream) -> bool:
    """Whether this FFmpeg can decode the stream; PyAV's types leave out that it may not."""
    return getattr(stream, "codec_context", None) is not None
