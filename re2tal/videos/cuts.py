"""Files that were cut off: seconds that they claim to last, and signs that the end is missing."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import SEEK_END
from typing import BinaryIO

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from re2tal.videos.limits import Deadline

# Seconds of sound that may be missing of those that a header claims.
_SILENT = 0.15

# Seconds before the end that a header claims, from which the end of the sound is looked for.
_NEAR_END = 5.0

# Byte with which packets of a transport stream begin, and lengths of packets: without and with a
# time stamp of four bytes before that byte.
_SYNC = 0x47
_LENGTHS = {188: 0, 192: 4}

# Lengths of chunks that were not filled in, as the file was written in one go.
_UNKNOWN = frozenset({0, 0xFFFFFFFF})


def claimed_seconds(container: InputContainer, stream: VideoStream, start: float) -> float | None:
    """Seconds that a video lasts by its header, perhaps with sound that outlasts the picture.

    Args:
        container: open file.
        stream: stream of pictures in it.
        start: presentation of the first frame, in seconds by the file's clock.

    Returns:
        Seconds from the first frame on; None if the header says nothing.
    """
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if not container.duration:
        return None
    # counted from the clock's second 0 or, if that cannot be, from where the sound starts
    duration = container.duration / av.time_base
    return duration - (start if 0 < start < duration else lateness(container, start))


def lateness(container: InputContainer, start: float) -> float:
    """Seconds by which the picture begins after the file does."""
    begin = container.start_time
    return 0.0 if begin is None else max(0.0, start - begin / av.time_base)


def lacks_sound(
    container: InputContainer, picture: VideoStream, claimed: float, deadline: Deadline
) -> bool:
    """Tell if no stream but the picture's lasts as long as the header claims.

    Args:
        container: the file, opened for this.
        picture: stream of pictures in it.
        claimed: seconds that the file claims to last.
        deadline: time limit of the reading.
    """
    begin, end = (container.start_time or 0) / av.time_base, 0.0
    if len(container.streams) == 1:
        return True
    with suppress(av.FFmpegError):  # without a seek, it is read from its start
        container.seek(int((begin + claimed - _NEAR_END) * av.time_base))
    # an unreadable end is no end; PyAV raises IndexError if streams appear after opening
    with suppress(av.FFmpegError, IndexError):
        for packet in container.demux():
            deadline.check()
            other = packet.stream_index != picture.index
            if other and packet.pts is not None and packet.time_base is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return claimed - (end - begin) > _SILENT


def stops_midway(file: BinaryIO, container: InputContainer) -> bool:
    """Tell if a file ends in a packet of a transport stream, a box of an MP4 or a chunk of an AVI.

    Args:
        file: the file; its position is kept.
        container: the same, open.
    """
    names = container.format.name.split(",")
    with _kept_position(file):
        size = file.seek(0, SEEK_END)
        if "mpegts" in names:
            return _splits_packet(file, size)
        if "avi" in names:
            return _splits_chunk(file, size)
        return "mov" in names and _splits_box(file, size)


@contextmanager
def _kept_position(file: BinaryIO) -> Iterator[None]:
    """Return to the position in a file at the end."""
    place = file.tell()
    try:
        yield
    finally:
        file.seek(place)


def _splits_packet(file: BinaryIO, size: int) -> bool:
    """Tell if a transport stream ends within a packet."""
    file.seek(0)
    head = file.read(2 * max(_LENGTHS))
    for length, place in _LENGTHS.items():
        if head[place::length][:2] == bytes([_SYNC, _SYNC]):
            return size % length != 0
    return False


def _splits_box(file: BinaryIO, size: int) -> bool:
    """Tell if an MP4 ends within one of its outermost boxes."""
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:
            return False  # it lasts to the end, wherever that is
        if length < 8:
            return False  # nothing that can be followed
        place += length
    return place > size


def _splits_chunk(file: BinaryIO, size: int) -> bool:
    """Tell if an AVI ends within one of its outermost chunks, of which large files have several."""
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or length in _UNKNOWN:
            return False  # nothing that can be followed
        place += 8 + length + length % 2
    return place > size + 1  # padding may be left out
