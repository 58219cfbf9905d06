"""Packets before decoding: skipping of packets that no wanted frame needs, missing packets."""

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

# FFmpeg's AV_FIELD_PROGRESSIVE; a packet of interlaced video may hold half a frame.
_PROGRESSIVE = 1

# Greatest number of packets read ahead of the decoder.
_MOST_SKIPPED = 64


def can_skip(container: InputContainer, stream: VideoStream) -> bool:
    """Tell if frames of a stream can be skipped without changing other frames.

    H.264 marks the frames that no other frame refers to, and its decoder can skip them. HEVC marks
    only frames to which none of the same temporal layer refers.
    """
    decoder = stream.codec_context
    timed = not _TIMED.isdisjoint(container.format.name.split(","))
    return timed and decoder.name == "h264" and decoder.field_order == _PROGRESSIVE


class PacketBuffer:
    """Iterator over packets that can be inspected in advance."""

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
        """Yield up to `count` of the next packets without consuming them."""
        for place in range(count):
            if place == len(self._ahead):
                try:
                    self._ahead.append(next(self._packets))
                except Exception as error:  # of any kind: raised after the packets before it
                    self._end = error
                    return
            yield self._ahead[place]


class FrameSkipper:
    """Iterator over packets that tells the decoder which of them to skip.

    A frame is shown until the next frame in presentation order. Which frame is next is known a few
    packets later: a frame is never presented before its decoding time, so no frame can fall between
    two others once a packet's decoding time exceeds the presentation time of the second. Packets
    are therefore read ahead, which is cheap, and decoded once it is known whether a target falls
    between the two. If none does, the decoder skips the frame, unless others refer to it. The very
    last frame is always decoded, as proof of the video's end.

    Every packet is yielded, in order, with the decoder set for it. A reading error is raised after
    all packets before it, and ends the iterator.

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
        # packets with their presentation times; None for packets that show no frame
        self._ahead: deque[tuple[Packet[Any], int | None]] = deque()
        self._times: list[int] = []  # presentation times read so far, sorted; old ones are dropped
        self._decoding = -math.inf  # decoding time of the packet read last
        self._orderly = True  # false once the time stamps allow no conclusion
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
            # later packets are presented after this time; keep only the last time before it
            del self._times[: max(0, bisect_left(self._times, self._earliest()) - 1)]
        return packet

    def _read(self) -> None:
        """Read one more packet."""
        try:
            packet = next(self._packets)
        except Exception as error:  # of any kind: raised after the packets before it
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
        """Tell if a target falls between a frame and the next one in presentation order."""
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
        """Return a lower bound of the presentation times of coming packets."""
        return min([self._decoding, *(time for _, time in self._ahead if time is not None)])


# Types of H.264's NAL units that hold slices of a picture.
_SLICES = frozenset({1, 2, 5})


def is_unreferenced(stream: VideoStream, packet: bytes) -> bool:
    """Tell if a `packet` of `stream` holds a picture to which no other picture refers."""
    extra = stream.codec_context.extradata
    if extra and extra[0] == 1:  # units preceded by their lengths, as in MP4 and Matroska
        return _lengths(packet, (extra[4] & 3) + 1)
    place = packet.find(b"\0\0\1")
    while 0 <= place < len(packet) - 3:
        # header of a unit: 1 bit zero, 2 bits nal_ref_idc (0: unreferenced), 5 bits type
        if (unit := packet[place + 3]) & 31 in _SLICES:
            return not unit >> 5 & 3
        place = packet.find(b"\0\0\1", place + 3)
    return False


def _lengths(packet: bytes, size: int) -> bool:
    """Tell the same for units that each follow their length, a number of `size` bytes."""
    place = 0
    while place + size < len(packet):
        if (unit := packet[place + size]) & 31 in _SLICES:
            return not unit >> 5 & 3
        place += size + int.from_bytes(packet[place : place + size], "big")
    return False


# Greatest size of Matroska's headers between two packets, in bytes; those of a new cluster take 30.
_HEADERS = 128

# Bytes of a chunk's header before the packet; an AVI's index points to the header.
_CHUNK_HEADER = 8


class MissingPackets:
    """Detector of packets that FFmpeg skips silently in files with a damaged structure.

    In Matroska (WebM), FFmpeg searches the next cluster, which leaves bytes that belong to no
    packet. In AVI, it searches the next chunk and continues counting, so all later frames would be
    shown too early. `stream` is the video stream of the file.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._stream = stream
        names = container.format.name.split(",")
        self._matroska, self._avi = "matroska" in names, "avi" in names
        self._start: int | None = None  # file position of the previous packet
        self._end = 0

    @property
    def needs_all_streams(self) -> bool:
        """Tell if `lie_before` needs the packets of all streams."""
        return self._matroska

    def lie_before(self, packet: Packet[Any]) -> bool:
        """Tell if packets of any stream are missing between a packet and the previous one."""
        if not self._matroska or packet.pos is None:
            return False
        start = packet.pos
        first = self._start is None
        gap = start - self._end
        laced = start == self._start  # several packets in one block
        self._end = (self._end if laced else start) + packet.size
        self._start = start
        if packet.has_sidedata("matroska_block_additional"):
            self._start = None  # side data follow the packet and are not part of its size
        return not first and gap > _HEADERS

    def shift(self, packet: Packet[Any]) -> bool:
        """Tell if packets were missing, so that the time of this packet is wrong."""
        index = self._stream.index_entries
        if not self._avi or not len(index) or packet.dts is None or packet.pos is None:
            return False
        entry = index.search_timestamp(packet.dts, any_frame=True)
        return entry >= 0 and index[entry].pos + _CHUNK_HEADER != packet.pos
