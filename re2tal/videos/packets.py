"""Packets before they are decoded: those that no frame needs are skipped, missing ones noticed."""

from __future__ import annotations  # PyAV's Packet takes its parameter in stubs only

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

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


class PacketBuffer:
    """Iterator over packets, which can be looked at before they are given."""

    def __init__(self, packets: Iterator[Packet[Any]]) -> None:
        self._packets = packets
        self._ahead: deque[Packet[Any]] = deque()
        self._end: Exception | None = None  # error that ended the reading

    def __iter__(self) -> PacketBuffer:
        return self

    def __next__(self) -> Packet[Any]:
        if self._ahead:
            return self._ahead.popleft()
        if self._end is not None:
            raise self._end
        return next(self._packets)

    def peek(self, count: int) -> Iterator[Packet[Any]]:
        """Yield up to `count` of the next packets, all of which stay."""
        for place in range(count):
            if place == len(self._ahead):
                try:
                    self._ahead.append(next(self._packets))
                except Exception as error:  # of any kind: it is raised when its turn comes
                    self._end = error
                    return
            yield self._ahead[place]


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
