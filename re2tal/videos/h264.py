"""What packets of H.264 say of themselves (ITU-T H.264, 7.3.1 and 7.4.1)."""

from av.video.stream import VideoStream

# Types of the units that hold slices of a picture.
_SLICES = frozenset({1, 2, 5})


def is_unreferenced(stream: VideoStream, packet: bytes) -> bool:
    """Whether a packet holds a picture that no other leans on; False also if it holds none.

    Args:
        stream: The packet's.
        packet: Its content.
    """
    extra = stream.codec_context.extradata
    if extra and extra[0] == 1:  # units with their length in front, as in MP4 and Matroska
        return _lengths(packet, (extra[4] & 3) + 1)
    place = packet.find(b"\0\0\1")
    while 0 <= place < len(packet) - 3:
        if (unit := packet[place + 3]) & 31 in _SLICES:
            return not unit >> 5 & 3
        place = packet.find(b"\0\0\1", place + 3)
    return False


def _lengths(packet: bytes, size: int) -> bool:
    """The same, of units that each come after their length, a number of so many bytes."""
    place = 0
    while place + size < len(packet):
        if (unit := packet[place + size]) & 31 in _SLICES:
            return not unit >> 5 & 3
        place += size + int.from_bytes(packet[place : place + size], "big")
    return False
