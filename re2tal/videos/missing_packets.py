"""Packets that a damaged file passes over in silence."""

from __future__ import annotations  # PyAV's Packet takes its parameter in stubs only

from typing import Any

from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

# Bytes between two packets of Matroska that headers may take; those of a new cluster take 30.
_HEADERS = 128

# An index of AVI names the header of a chunk, which the packet follows.
_CHUNK_HEADER = 8


class MissingPackets:
    """Notices packets that FFmpeg passed over without a word, in files that lost their structure.

    In Matroska (WebM) it looks for the next cluster, which leaves bytes that belong to no packet.
    In AVI it looks for the next chunk, and counts on: all later frames would be shown too early.

    Args:
        container: The file.
        stream: Its stream of pictures.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._stream = stream
        names = container.format.name.split(",")
        self._matroska, self._avi = "matroska" in names, "avi" in names
        self._start: int | None = None  # in the file, of the packet before
        self._end = 0

    @property
    def needs_all_streams(self) -> bool:
        """Whether `lie_before` must be told of the packets of all streams."""
        return self._matroska

    def lie_before(self, packet: Packet[Any]) -> bool:
        """Whether some are missing between a packet and the one before, of whichever stream."""
        if not self._matroska or packet.pos is None:
            return False
        start = packet.pos
        first = self._start is None
        gap = start - self._end
        laced = start == self._start  # several packets in one block
        self._end = (self._end if laced else start) + packet.size
        self._start = start
        if packet.has_sidedata("matroska_block_additional"):
            self._start = None  # it follows the packet, and is not counted in its size
        return not first and gap > _HEADERS

    def shift(self, packet: Packet[Any]) -> bool:
        """Whether some were missing, so that the time of this packet is wrong."""
        index = self._stream.index_entries
        if not self._avi or not len(index) or packet.dts is None or packet.pos is None:
            return False
        entry = index.search_timestamp(packet.dts, any_frame=True)
        return entry >= 0 and index[entry].pos + _CHUNK_HEADER != packet.pos
