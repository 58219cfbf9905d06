"""Detection of truncated files: the claimed duration, and signs that the end is missing."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import SEEK_END
from typing import BinaryIO

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from re2tal.videos.limits import Deadline

# Seconds by which sound may end before the duration in the header.
_SILENT = 0.15

# Seconds before the claimed end from which the end of the sound is searched.
_NEAR_END = 5.0

# First byte of packets of a transport stream, and for each packet length the position of that byte:
# some files have a time stamp of four bytes before it.
_SYNC = 0x47
_LENGTHS = {188: 0, 192: 4}

# Lengths of chunks that were never filled in, because the file was written as a stream.
_UNKNOWN = frozenset({0, 0xFFFFFFFF})


def claimed_seconds(container: InputContainer, stream: VideoStream, start: float) -> float | None:
    """Read the duration in a video's header; it may include sound that outlasts the picture.

    Args:
        container: open file.
        stream: its video stream.
        start: presentation time of the first frame, in seconds of the file's clock.

    Returns:
        Seconds from the first frame on; None if the header has no duration.
    """
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if not container.duration:
        return None
    # counted from second 0 of the clock or, if that is impossible, from the start of the sound
    duration = container.duration / av.time_base
    return duration - (start if 0 < start < duration else lateness(container, start))


def lateness(container: InputContainer, start: float) -> float:
    """Compute the seconds from the start of the file to the first picture."""
    begin = container.start_time
    return 0.0 if begin is None else max(0.0, start - begin / av.time_base)


def lacks_sound(
    container: InputContainer, picture: VideoStream, claimed: float, deadline: Deadline
) -> bool:
    """Tell if no stream other than the video stream reaches the duration in the header.

    Args:
        container: the file, opened for this purpose.
        picture: its video stream.
        claimed: duration in the header, in seconds.
        deadline: time limit of the reading.
    """
    begin, end = (container.start_time or 0) / av.time_base, 0.0
    if len(container.streams) == 1:
        return True
    with suppress(av.FFmpegError):  # if the seek fails, the file is read from its start
        container.seek(int((begin + claimed - _NEAR_END) * av.time_base))
    # an unreadable end counts as missing; PyAV raises IndexError if streams appear after opening
    with suppress(av.FFmpegError, IndexError):
        for packet in container.demux():
            deadline.check()
            other = packet.stream_index != picture.index
            if other and packet.pts is not None and packet.time_base is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return claimed - (end - begin) > _SILENT


def stops_midway(file: BinaryIO, container: InputContainer) -> bool:
    """Tell if a file ends inside a packet (transport stream), a box (MP4) or a chunk (AVI).

    Args:
        file: the file; its position is kept.
        container: the same file, opened by PyAV.
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
    """Restore the position in a file on leaving."""
    place = file.tell()
    try:
        yield
    finally:
        file.seek(place)


def _splits_packet(file: BinaryIO, size: int) -> bool:
    """Tell if a transport stream ends inside a packet."""
    file.seek(0)
    head = file.read(2 * max(_LENGTHS))
    for length, place in _LENGTHS.items():
        if head[place::length][:2] == bytes([_SYNC, _SYNC]):
            return size % length != 0
    return False


def _splits_box(file: BinaryIO, size: int) -> bool:
    """Tell if an MP4 ends inside one of its outermost boxes."""
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:  # a length of 64 bits follows the type
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:
            return False  # the box extends to the end of the file
        if length < 8:
            return False  # not a valid length
        place += length
    return place > size


def _splits_chunk(file: BinaryIO, size: int) -> bool:
    """Tell if an AVI ends inside one of its outermost chunks; large files have several."""
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or length in _UNKNOWN:
            return False  # not a chunk with a valid length
        place += 8 + length + length % 2
    return place > size + 1  # the padding byte may be missing
