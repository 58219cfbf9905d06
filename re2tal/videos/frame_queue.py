"""Queue of the frames that come out of a decoder, with the reach of damage among them."""

from __future__ import annotations  # PyAV's Packet takes its parameter in stubs only

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from re2tal.videos.limits import Deadline, VideoError

# Containers whose packets all have times of presentation and of decoding.
_TIMED = frozenset({"mov", "matroska", "mpegts", "flv"})

# FFmpeg's AV_FIELD_PROGRESSIVE: of interlaced video, a packet may hold half a frame.
_PROGRESSIVE = 1

# Packets that are read ahead of the decoder, at most.
_MOST_SKIPPED = 64


def can_skip(container: InputContainer, stream: VideoStream) -> bool:
    """Tell if frames of a stream can be left out without any change of the others.

    H.264 marks the frames that no other frame refers to, and its decoder can skip them. HEVC marks
    only frames to which none of the same temporal layer refers.
    """
    decoder = stream.codec_context
    timed = not _TIMED.isdisjoint(container.format.name.split(","))
    return timed and decoder.name == "h264" and decoder.field_order == _PROGRESSIVE


class FrameSkipper:
    """Iterator over packets that tells the decoder which of them to skip.

    A frame is shown until the next one in presentation order, which is known a few packets later:
    as a frame is never presented before it is decoded, none can come between the two once a packet
    is to be decoded later than the second is presented. So packets are read ahead, which is cheap,
    and decoded when it is known whether one of the targets falls between the two. If none does, the
    decoder skips the frame, unless others refer to it. The very last frame is always decoded: it
    shows that the video reaches so far.

    Every packet is given, in order, with the decoder set for it. An error of reading is raised when
    all packets before it are given, and ends the iterator.

    Args:
        packets: packets of all streams, or of one.
        stream: stream that is decoded; see `can_skip`.
        targets: times at which frames are wanted, rising, as time stamps of the stream.
    """

    def __init__(
        self, packets: Iterator[Packet[Any]], stream: VideoStream, targets: Sequence[int]
    ) -> None:
        self._packets = packets
        self._stream = stream
        self._targets = targets
        # packets with their times of presentation; None for those that show no frame
        self._ahead: deque[tuple[Packet[Any], int | None]] = deque()
        self._times: list[int] = []  # of the packets read, sorted; those far behind are dropped
        self._decoding = -math.inf  # time of decoding of the packet read last
        self._orderly = True  # whether the time stamps allow any conclusion
        self._end: Exception | None = None  # error that ended the reading

    def __iter__(self) -> FrameSkipper:
        return self

    def __next__(self) -> Packet[Any]:
        while not self._ahead and self._end is None:
            self._read()
        if not self._ahead:
            assert self._end is not None
            raise self._end
        packet, time = self._ahead[0]
        needed = time is None or self._is_needed(time)
        self._stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
        self._ahead.popleft()
        if len(self._times) > 4 * _MOST_SKIPPED:
            # no later packet is presented before it is decoded; keep the last time before that
            del self._times[: max(0, bisect_left(self._times, self._earliest()) - 1)]
        return packet

    def _read(self) -> None:
        """Read one more packet."""
        try:
            packet = next(self._packets)
        except Exception as error:  # of any kind: it is raised when the packets before are given
            self._end = error
            return
        time = packet.pts
        if packet.stream is not self._stream or not packet.size or packet.is_discard:
            time = None
        elif time is None or (packet.dts is not None and not self._decoding <= packet.dts <= time):
            self._orderly = False
        else:
            insort(self._times, time)
            if packet.dts is not None:  # Matroska's first packets have none
                self._decoding = packet.dts
        self._ahead.append((packet, time))

    def _is_needed(self, time: int) -> bool:
        """Tell if a target falls between a frame and the one that is presented after it."""
        while self._orderly:
            place = bisect_right(self._times, time)
            if place < len(self._times):
                following = self._times[place]
                # the very first frame also stands for times before it
                first = 0 if self._times[0] == time else bisect_left(self._targets, time)
                if bisect_left(self._targets, following) <= first:
                    return False
                if self._decoding >= following:
                    return True
            if self._end is not None or len(self._ahead) >= _MOST_SKIPPED:
                return True
            self._read()
        return True

    def _earliest(self) -> float:
        """Time before which no packet to come is presented."""
        return min([self._decoding, *(time for _, time in self._ahead if time is not None)])


# Types of the units that hold slices of a picture.
_SLICES = frozenset({1, 2, 5})


def is_unreferenced(stream: VideoStream, packet: bytes) -> bool:
    """Tell if a `packet` of `stream` holds a picture, and one to which no other refers."""
    extra = stream.codec_context.extradata
    if extra and extra[0] == 1:  # units preceded by their length, as in MP4 and Matroska
        return _lengths(packet, (extra[4] & 3) + 1)
    place = packet.find(b"\0\0\1")
    while 0 <= place < len(packet) - 3:
        if (unit := packet[place + 3]) & 31 in _SLICES:
            return not unit >> 5 & 3
        place = packet.find(b"\0\0\1", place + 3)
    return False


def _lengths(packet: bytes, size: int) -> bool:
    """The same for units that each follow their length, a number of `size` bytes."""
    place = 0
    while place + size < len(packet):
        if (unit := packet[place + size]) & 31 in _SLICES:
            return not unit >> 5 & 3
        place += size + int.from_bytes(packet[place : place + size], "big")
    return False


# Bytes that headers may take between two packets of Matroska; those of a new cluster take 30.
_HEADERS = 128

# An index of AVI points to the header of a chunk, which precedes the packet.
_CHUNK_HEADER = 8


class MissingPackets:
    """Detector of packets that FFmpeg skipped silently, in files that lost their structure.

    In Matroska (WebM) FFmpeg looks for the next cluster, which leaves bytes that belong to no
    packet. In AVI it looks for the next chunk, and counts on: all later frames would be shown too
    early. `stream` is the stream of pictures in the file.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._stream = stream
        names = container.format.name.split(",")
        self._matroska, self._avi = "matroska" in names, "avi" in names
        self._start: int | None = None  # position in the file of the packet before
        self._end = 0

    @property
    def needs_all_streams(self) -> bool:
        """Tell if `lie_before` needs the packets of all streams."""
        return self._matroska

    def lie_before(self, packet: Packet[Any]) -> bool:
        """Tell if packets of any stream are missing between a packet and the one before."""
        if not self._matroska or packet.pos is None:
            return False
        start = packet.pos
        first = self._start is None
        gap = start - self._end
        laced = start == self._start  # several packets in one block
        self._end = (self._end if laced else start) + packet.size
        self._start = start
        if packet.has_sidedata("matroska_block_additional"):
            self._start = None  # its data follow the packet and do not count in its size
        return not first and gap > _HEADERS

    def shift(self, packet: Packet[Any]) -> bool:
        """Tell if packets were missing, so that the time of this packet is wrong."""
        index = self._stream.index_entries
        if not self._avi or not len(index) or packet.dts is None or packet.pos is None:
            return False
        entry = index.search_timestamp(packet.dts, any_frame=True)
        return entry >= 0 and index[entry].pos + _CHUNK_HEADER != packet.pos


# Unreadable packets in a row after which reading of a file ends.
_MOST_UNREADABLE = 100

# Packets decoded beyond a frame to see whether the frames it refers to are intact: as many as a
# frame of H.264 or HEVC can refer to.
_MOST_AHEAD = 16

# Codecs in which every packet gives a frame, unless it is interlaced. Others also have packets for
# frames that are never shown.
_ONE_FRAME_A_PACKET = frozenset({"h264", "hevc"})

# FFmpeg's names for the order of fields: unknown and progressive.
_NO_FIELDS = frozenset({0, 1})

# Packets by which frames of AVI may come out late: they have the time of the last packet.
_DELAY = 4

# Packets by which the one marked as corrupt may come before the one that is. Parsers of transport
# streams mark the packet that they finish when they meet the damage.
_LATE = 2


class Shown(NamedTuple):
    """Frame, time of its presentation (ticks), and place of its packet in decoding order."""

    frame: VideoFrame
    time: int
    number: int


@dataclass(slots=True)
class _Damage:
    """Packets from `first` on, in decoding order, up to the key frame presented at `restored`.

    `lost` is set if packets with unknown times are missing.
    """

    first: int
    lost: bool
    restored: int | None = None


class FrameQueue:
    """Frames of a stream in presentation order, from the current position of its file.

    Packets that cannot be read or decoded do not end it. They are remembered, because frames that
    refer to them come out of the decoder as if nothing were wrong: patched up, or as repeats. All
    frames decoded after them count as damaged, up to those shown from the next key frame on.

    Args:
        name: name of the video in errors.
        container: open file.
        stream: stream of pictures in it.
        deadline: time limit of all reading and decoding.
        targets: times at which frames are wanted, rising, as time stamps of the stream; None if
            unknown. Frames that are shown at none of them may be left out.
    """

    reason: str  # the decoder's message on the first damage
    delay: int  # packets by which frames may come out after their own, with a later one's time
    shifted: bool  # whether times are wrong until the next seek

    def __init__(
        self,
        name: str,
        container: InputContainer,
        stream: VideoStream,
        deadline: Deadline,
        targets: Sequence[int] | None = None,
    ) -> None:
        self.reason = ""
        self.shifted = False
        self._name = name
        self._container = container
        self._stream = stream
        self._deadline = deadline
        self._targets = targets if can_skip(container, stream) else None
        self._missing = MissingPackets(container, stream)
        self._packets = self._demux()
        self._ready: deque[Shown] = deque()
        self._sent = 0  # packets
        self._suspect_until = 0  # number of a packet
        self._key = 0  # number of the last key packet
        self._numbers: dict[int, int] = {}  # of packets sent, by time, without those passed
        decoder = stream.codec_context
        self._accounts = decoder.name in _ONE_FRAME_A_PACKET and decoder.field_order in _NO_FIELDS
        self._expected: dict[int, int] = {}  # as `_numbers`, of packets that still owe a frame
        self.delay = _DELAY if container.format.name == "avi" else 0
        self._begun = False  # whether a frame has come out
        self._damages: list[_Damage] = []
        self._untimed = 0  # ticks of frames that came without times

    @property
    def position(self) -> Shown | None:
        """Next frame, if it is decoded already."""
        return self._ready[0] if self._ready else None

    def peek(self) -> Shown | None:
        """Next frame, which stays in the queue; None at the end of the video.

        Raises:
            VideoError: the file cannot be read, or the deadline has passed.
        """
        while not self._ready:
            if not self._feed():
                return None
        return self._ready[0]

    def pop(self) -> None:
        """Drop the next frame."""
        time = self._ready.popleft().time
        if len(self._numbers) > _MOST_AHEAD:
            self._numbers = {at: number for at, number in self._numbers.items() if at >= time}
        if self._damages:
            self._damages = [d for d in self._damages if d.restored is None or d.restored > time]

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """Packets that come next, undecoded."""
        while (packet := self._next_packet()) is not None:
            self._deadline.check()
            if packet.size:
                yield packet

    def is_damaged(self, shown: Shown, target: int) -> bool:
        """Tell if damage has reached a frame, or lost another one between it and a time.

        Args:
            shown: the frame dropped last, or the next one if there is none before it.
            target: time in ticks, before the next frame.
        """
        self._look_ahead(shown)
        overdue = shown.time + (shown.frame.duration or 0) <= target
        for damage in self._damages:
            if damage.restored is not None and damage.restored <= shown.time:
                continue
            missing = any(shown.time < time <= target for time in self._numbers)
            if damage.first <= shown.number or missing or (damage.lost and overdue):
                return True
        return False

    def _look_ahead(self, shown: Shown) -> None:
        """Decode until every frame is out that was decoded before a frame but is shown later."""
        leans_on = [t for t, n in self._numbers.items() if t > shown.time and n < shown.number]
        last = max(leans_on, default=shown.time)
        for _ in range(_MOST_AHEAD):
            if last <= (self._ready[-1].time if self._ready else shown.time) or not self._feed():
                break

    def _feed(self) -> bool:
        """Decode one more packet; False if there is none."""
        self._deadline.check()
        packet = self._next_packet()
        if packet is None:
            return False
        # AVI has no presentation times; its frames are stored in the order in which they are shown
        time = packet.dts if packet.pts is None or self.delay else packet.pts
        if not packet.size and time is not None:
            return True  # an omitted frame, as in AVI; FFmpeg would take it for the end
        self._sent += 1
        if time is not None:
            self._numbers[time] = self._sent
            if packet.is_keyframe:
                self._key = self._sent
            if self._accounts and not packet.is_discard and not self._is_skipped(packet):
                self._expected[time] = self._sent
        self.shifted = self._missing.shift(packet)
        if packet.is_corrupt:
            self._suspect_until = self._sent + _LATE
        if self.shifted or self._sent <= self._suspect_until:
            self._add_damage(self._sent, "packets are missing", lost=True)
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            self._add_damage(self._sent, error.strerror or str(error))
            self._untimed += packet.duration or 0
            return True
        for frame in frames:
            self._add(frame)
        return True

    def _demux(self) -> Iterator[Packet[Any]]:
        """Packets from the current position of the file."""
        packets: Iterator[Packet[Any]] = (
            self._container.demux()
            if self._missing.needs_all_streams
            else self._container.demux(self._stream)
        )
        if self._targets is None:
            return packets
        return FrameSkipper(packets, self._stream, self._targets)

    def _next_packet(self) -> Packet[Any] | None:
        """Next readable packet of the stream; None if there are no more."""
        unreadable = 0
        while unreadable < _MOST_UNREADABLE:
            try:
                packet = next(self._packets, None)
            except av.FFmpegError as error:
                self._deadline.check()  # which also interrupts reading
                if not isinstance(error, av.error.InvalidDataError):
                    raise VideoError(self._name, f"cannot be read: {error.strerror}") from error
                unreadable += 1
                self._lose(error.strerror or str(error))
                self._packets = self._demux()
                continue
            except IndexError:
                # PyAV ends so, without emptying decoders, if streams appeared after opening
                packet = Packet()
                packet.stream = self._stream
            if packet is not None and self._missing.lie_before(packet):
                self._lose("packets are missing")
            if packet is None or packet.stream is self._stream:
                return packet
        return None

    def _lose(self, reason: str) -> None:
        """Record that packets are missing."""
        self._sent += 1
        self._add_damage(self._sent, reason, lost=True)

    def _add(self, frame: VideoFrame) -> None:
        """Take a frame from the decoder."""
        time = frame.dts if frame.pts is None else frame.pts
        if time is None:  # raw streams have no times: their frames are shown at an even rate
            time = self._untimed
            self._untimed += self._duration(frame)
        self._account(time)
        known = time in self._numbers
        shown = Shown(frame, time, self._numbers.get(time, self._sent))
        if frame.is_corrupt:
            self._add_damage(shown.number if known else shown.number - _MOST_AHEAD, "is patched up")
        elif frame.key_frame and known:
            for damage in self._damages:
                if damage.restored is None and damage.first < shown.number - self.delay:
                    damage.restored = time
        self._ready.append(shown)

    def _is_skipped(self, packet: Packet[Any]) -> bool:
        """Tell if the decoder skips a packet: no frame refers to it and none is wanted."""
        if self._targets is None or self._stream.codec_context.skip_frame == "DEFAULT":
            return False
        return is_unreferenced(self._stream, bytes(packet))

    def _account(self, time: int) -> None:
        """Notice packets that gave no frame, now that a later one is out."""
        self._expected.pop(time, None)
        if self._expected and min(self._expected) < time:
            overdue = [number for at, number in self._expected.items() if at < time]
            if self._begun:  # before the first frame, packets refer to others from before
                self._add_damage(min(overdue), "a packet gave no frame")
            self._expected = {at: number for at, number in self._expected.items() if at > time}
        self._begun = True

    def _duration(self, frame: VideoFrame) -> int:
        """Ticks for which a frame of a raw stream is shown."""
        if not frame.duration:
            raise VideoError(self._name, "its frames carry no times")
        return frame.duration

    def _add_damage(self, first: int, reason: str, *, lost: bool = False) -> None:
        """Record damage, unless there is some that reaches as far: up to the same key frame."""
        self.reason = self.reason or reason
        for damage in self._damages:
            if damage.restored is None and self._key <= damage.first <= first:
                damage.lost |= lost
                return
        self._damages.append(_Damage(first, lost))
