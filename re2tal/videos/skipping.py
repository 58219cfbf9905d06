"""Leaving out frames that nobody asks for and no other frame leans on."""

from __future__ import annotations  # PyAV's Packet takes its parameter in stubs only

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

# Containers whose packets all say when they are presented, and when they are decoded.
_TIMED = frozenset({"mov", "matroska", "mpegts", "flv"})

# FFmpeg's AV_FIELD_PROGRESSIVE: of interlaced video, a packet may hold half a frame.
_PROGRESSIVE = 1

# Packets that are read before one is given to the decoder, at most.
_MOST_AHEAD = 64


def can_skip(container: InputContainer, stream: VideoStream) -> bool:
    """Whether frames of a stream may be left out without any change of the others.

    H.264 marks the frames that no other leans on, and its decoder can pass over them. HEVC only
    says that none of the same temporal layer does.
    """
    decoder = stream.codec_context
    timed = not _TIMED.isdisjoint(container.format.name.split(","))
    return timed and decoder.name == "h264" and decoder.field_order == _PROGRESSIVE


class FrameSkipper:
    """Packets on their way to the decoder, which is told to pass over those that are not needed.

    A frame is shown until the next one in presentation order is, which is known a few packets
    later: as a frame is never presented before it is decoded, none can come between the two once
    a packet is to be decoded later than the second is presented. So packets are read ahead, which
    is cheap, and decoded when it is known whether one of the targets falls between the two. If
    none does, the decoder passes over the frame, unless others lean on it. The last frame of all is
    always decoded: it tells that the video reaches so far.

    An iterator: it gives every packet, in order, and sets the decoder for it. An error of reading
    is raised when all packets before it are given, and ends the iterator.

    Args:
        packets: What is read; of all streams, or of one.
        stream: The stream that is decoded; see `can_skip`.
        targets: The times at which frames are wanted, rising, as time stamps of the stream.
    """

    def __init__(
        self, packets: Iterator[Packet[Any]], stream: VideoStream, targets: Sequence[int]
    ) -> None:
        self._packets = packets
        self._stream = stream
        self._targets = targets
        # packets with their times of presentation; without a time those that show no frame
        self._ahead: deque[tuple[Packet[Any], int | None]] = deque()
        self._times: list[int] = []  # of the packets read, sorted; those far behind are dropped
        self._decoding = -math.inf  # when the packet read last is to be decoded
        self._orderly = True  # whether the time stamps allow any conclusion
        self._end: Exception | None = None  # what reading ended with

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
        if len(self._times) > 4 * _MOST_AHEAD:
            # no frame to come is presented before it is decoded; the last one before stays known
            del self._times[: max(0, bisect_left(self._times, self._earliest()) - 1)]
        return packet

    def _read(self) -> None:
        """Reads one more packet."""
        try:
            packet = next(self._packets)
        except Exception as error:  # whatever it is, it is raised in its turn
            self._end = error
            return
        time = packet.pts
        if packet.stream is not self._stream or not packet.size or packet.is_discard:
            time = None
        elif time is None or (packet.dts is not None and not self._decoding <= packet.dts <= time):
            self._orderly = False
        else:
            insort(self._times, time)
            if packet.dts is not None:  # Matroska does not know it of the first ones
                self._decoding = packet.dts
        self._ahead.append((packet, time))

    def _is_needed(self, time: int) -> bool:
        """Whether a target falls between a frame and the one that is presented after it."""
        while self._orderly:
            place = bisect_right(self._times, time)
            if place < len(self._times):
                following = self._times[place]
                # the first frame of all also stands for times before it
                first = 0 if self._times[0] == time else bisect_left(self._targets, time)
                if bisect_left(self._targets, following) <= first:
                    return False
                if self._decoding >= following:
                    return True
            if self._end is not None or len(self._ahead) >= _MOST_AHEAD:
                return True
            self._read()
        return True

    def _earliest(self) -> float:
        """A time before which no packet to come is presented."""
        return min([self._decoding, *(time for _, time in self._ahead if time is not None)])
