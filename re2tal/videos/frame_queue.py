"""Queue of decoded frames in presentation order, which tracks the extent of damage."""

from __future__ import annotations  # PyAV's Packet takes its parameter in stubs only

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from re2tal.videos.limits import Deadline, VideoError
from re2tal.videos.packets import (
    FrameSkipper,
    MissingPackets,
    PacketBuffer,
    can_skip,
    is_unreferenced,
)

# Number of consecutive unreadable packets that ends the reading of a file.
_MOST_UNREADABLE = 100

# Packets decoded after a frame to see whether its reference frames are intact: the greatest number
# of reference frames in H.264 and HEVC.
_MOST_AHEAD = 16

# Codecs in which every packet gives a frame, unless the video is interlaced. Other codecs also have
# packets of frames that are never shown.
_ONE_FRAME_A_PACKET = frozenset({"h264", "hevc"})

# Decoders that invent a grey picture if the reference of the first frame is missing. Other decoders
# give nothing, or an error, until they have all references of a frame.
_MAKE_UP = frozenset(
    {"mpeg4", "msmpeg4", "msmpeg4v1", "msmpeg4v2", "wmv1", "wmv2", "wmv3", "vc1", "flv"}
    | {"h261", "h263", "h263i", "h263p", "mpeg1video", "mpeg2video", "rv10", "rv20", "rv30", "rv40"}
)

# Formats without time stamps (the parser of MPEG-1 and 2 guesses some): packets are counted.
_UNTIMED = frozenset({"h264", "hevc", "mpegvideo"})

# Number of packets at the start of a file within which a wrong order of frame times must show.
_MOST_CHECKED = 64

# Name and version in streams of DivX and Xvid whose packets hold a B-frame and another frame.
_PACKED = re.compile(rb"DivX\d+(?:b|Build)\d+p")

# FFmpeg's field orders "unknown" and "progressive".
_NO_FIELDS = frozenset({0, 1})

# Packets by which frames of AVI may come out late; they then have the time of the latest packet.
_DELAY = 4

# Packets by which the marked packet may precede the corrupt one: parsers of transport streams mark
# the packet that they finish when they meet the damage.
_LATE = 2


def lacks_times(container: InputContainer, stream: VideoStream) -> bool:
    """Tell if FFmpeg's presentation times of the packets are meaningless.

    A raw stream holds no times, and AVI only decoding times. From these, FFmpeg can derive the
    order of frames of older codecs, but not of H.264 and HEVC.
    """
    name = container.format.name
    return name in _UNTIMED or (name == "avi" and stream.codec_context.name in _ONE_FRAME_A_PACKET)


class Shown(NamedTuple):
    """Frame, its presentation time (ticks), and the number of its packet in decoding order.

    If frames are shown in the decoder's order, the number is that of the packet with which the
    frame came out.
    """

    frame: VideoFrame
    time: int
    number: int


@dataclass(slots=True)
class _Damage:
    """Damage from packet `first` on, in decoding order, up to the key frame shown at `restored`.

    `lost` is true if packets with unknown times are missing.
    """

    first: int
    lost: bool
    restored: int | None = None


class FrameQueue:
    """Frames of a stream in presentation order, from the current position of its file.

    The queue continues after packets that cannot be read or decoded, but records them: the decoder
    outputs frames that refer to them without an error, concealed or as repeats. All frames decoded
    after such a packet count as damaged, up to the next key frame.

    Args:
        name: name of the video in errors.
        container: open file.
        stream: its video stream.
        deadline: time limit of all reading and decoding.
        targets: times at which frames are wanted, rising, as time stamps of the stream; None if
            unknown. Frames that are shown at none of these times may be skipped.
        ordered: show frames in the decoder's order, each at the decoding time of the packet with
            which it comes out, because their own times are wrong.
        is_cut: function that tells if the file ends inside a packet, box or chunk.
    """

    reason: str  # the decoder's message on the first damage
    first_is_late: bool  # true if the first frame came out after all packets, at the file's end
    delay: int  # packets by which a frame may come out late, with the time of a later packet
    ended: bool  # true once the last packet was decoded
    shifted: bool  # true if times are wrong until the next seek

    def __init__(
        self,
        name: str,
        container: InputContainer,
        stream: VideoStream,
        deadline: Deadline,
        targets: Sequence[int] | None = None,
        ordered: bool = False,
        is_cut: Callable[[], bool] = lambda: False,
    ) -> None:
        self.reason = ""
        self.shifted = self.first_is_late = self.ended = False
        self._is_cut = is_cut
        self._name = name
        self._container = container
        self._stream = stream
        self._deadline = deadline
        self._ordered = ordered
        self._targets = targets if can_skip(container, stream) and not ordered else None
        self._missing = MissingPackets(container, stream)
        self._packets = self._demux()
        self._ready: deque[Shown] = deque()
        self._sent = 0  # number of packets sent to the decoder
        self._suspect_until = 0  # packets up to this number may be corrupt
        self._key = 0  # number of the last key packet
        self._numbers: dict[int, int] = {}  # time -> number, of sent packets not yet passed
        # in the decoder's order: presentation time -> number, of packets whose frame is not out yet
        self._owners: dict[int, int] = {}
        decoder = stream.codec_context
        self._makes_up = decoder.name in _MAKE_UP
        self._accounts = decoder.name in _ONE_FRAME_A_PACKET and decoder.field_order in _NO_FIELDS
        self._expected: dict[int, int] = {}  # as `_numbers`, of packets without a frame so far
        self.delay = _DELAY if container.format.name == "avi" and not ordered else 0
        self._latest: int | None = None  # time of the frame that came out last
        self._damages: list[_Damage] = []
        # time of the next packet, where times are counted from packets
        self._counted = 0 if container.format.name in _UNTIMED else None

    @property
    def position(self) -> Shown | None:
        """Next frame, if it is already decoded."""
        return self._ready[0] if self._ready else None

    @property
    def last(self) -> Shown | None:
        """Last frame that is decoded and not yet dropped."""
        return self._ready[-1] if self._ready else None

    @property
    def is_at_key(self) -> bool:
        """Tell if the first decoded frame needs no earlier frame and has a reliable time."""
        return not self.first_is_late and not (self._damages and self._damages[0].first == 0)

    def peek(self) -> Shown | None:
        """Return the next frame without removing it; None at the end of the video.

        Raises:
            VideoError: the file cannot be read, or the deadline has passed.
        """
        while not self._ready:
            if not self._feed():
                return None
        return self._ready[0]

    def pop(self) -> None:
        """Remove the next frame."""
        time = self._ready.popleft().time
        if len(self._numbers) > _MOST_AHEAD:  # prune now and then, so that memory is bounded
            self._numbers = {at: number for at, number in self._numbers.items() if at >= time}
            oldest = self._sent - 2 * _MOST_AHEAD - self._stream.thread_count
            self._owners = {at: number for at, number in self._owners.items() if number > oldest}
        if self._damages:
            self._damages = [d for d in self._damages if d.restored is None or d.restored > time]

    def may_hide_reordering(self) -> bool:
        """Tell if the decoder reorders frames although the next packets' times do not go back.

        No packet is consumed. In an intact file, almost always the third or fourth packet has an
        earlier time than the previous one.
        """
        if not self._stream.codec_context.has_b_frames:
            return False
        latest = -math.inf
        for packet in self._buffer.peek(_MOST_CHECKED):
            if packet.stream is self._stream and packet.pts is not None:
                if packet.pts < latest:
                    return False
                latest = packet.pts
        return True

    def reorders(self) -> bool:
        """Decode the next packets, and tell if frames come out in an order that is not by time.

        MPEG-4 also declares packets that may hold two frames, although the first such packet may
        come much later. The queue must not be used after this call.
        """
        if self._stream.codec_context.name == "mpeg4":
            packets = [p for p in self._buffer.peek(_MOST_CHECKED) if p.stream is self._stream]
            head = self._stream.codec_context.extradata or b""
            if _PACKED.search(head + b"".join(map(bytes, packets[:1]))):
                return True
        latest = -math.inf
        while self._sent < _MOST_CHECKED and self._feed():
            while self._ready:
                time = self._ready.popleft().frame.pts
                if time is not None:
                    if time < latest:
                        return True
                    latest = time
        return False

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """Yield the following packets without decoding them."""
        while (packet := self._next_packet()) is not None:
            self._deadline.check()
            if packet.size:
                yield packet

    def is_damaged(self, shown: Shown, target: int) -> bool:
        """Tell if a frame is damaged, or if a frame between it and a time was lost.

        Args:
            shown: the frame removed last, or the next frame if none was removed.
            target: time in ticks, before the next frame.
        """
        self._look_ahead(shown, target)
        # With lost packets of unknown times, a frame may have been due between the two.
        overdue = shown.time + (shown.frame.duration or 0) <= target
        for damage in self._damages:
            if damage.restored is not None and damage.restored <= shown.time:
                continue
            missing = any(shown.time < time <= target for time in self._numbers)
            if damage.first <= shown.number or missing or (damage.lost and overdue):
                return True
        return False

    def _look_ahead(self, shown: Shown, target: int) -> None:
        """Decode until all frames are out that are decoded before a frame but shown after it.

        If packets before the target have given no frame, decode one more frame: times that go back
        become visible only with the frame after the next one.
        """
        if self._ordered:
            oldest = shown.number - _MOST_AHEAD  # older packets give no frame any more
            while any(oldest < number <= shown.number for number in self._owners.values()):
                oldest = self._sent - _MOST_AHEAD - self._stream.thread_count
                if not self._feed():
                    break
            return
        # Times of frames that are decoded before this one and shown after it: it may refer to them.
        leans_on = [t for t, n in self._numbers.items() if t > shown.time and n < shown.number]
        last = max(leans_on, default=shown.time)
        for _ in range(_MOST_AHEAD):
            if last <= (self._ready[-1].time if self._ready else shown.time) or not self._feed():
                break
        if (
            len(self._ready) == 1
            and self._stream.codec_context.has_b_frames
            and not self._accounts
            and any(shown.time < time <= target for time in self._numbers)
        ):
            self._feed()

    def _feed(self) -> bool:
        """Decode one more packet; return False if there is none."""
        self._deadline.check()
        packet = self._next_packet()
        if packet is None:
            self.ended = True
            return False
        if not packet.size and packet.dts is None:
            self._end()
        # AVI has no presentation times; its frames are stored in presentation order
        by_order = self._ordered or self.delay
        time = packet.dts if packet.pts is None or by_order else packet.pts
        if not packet.size and time is not None:
            return True  # an omitted frame, as in AVI; FFmpeg would treat it as the end
        self._sent += 1
        if time is not None:
            self._numbers[time] = self._sent
            if self._ordered and packet.pts is not None:
                self._owners[packet.pts] = self._sent
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
            return True
        for frame in frames:
            self._add(frame)
        if self.ended and self._expected and self._latest is not None:
            self._add_damage(min(self._expected.values()), "a packet gave no frame")
        return True

    def _end(self) -> None:
        """Mark the end of the packets, and record damage if the last one is truncated."""
        self.ended = True
        # In a transport stream, FFmpeg finds the end of a packet only by the next one; in AVI and
        # in the decoder's order, the next packet also tells when a frame is shown.
        name = self._container.format.name
        if (self._ordered or name in {"avi", "mpegts"}) and self._is_cut():
            self._add_damage(self._sent, "the file was cut off", lost=True)

    def _demux(self) -> Iterator[Packet[Any]]:
        """Return the iterator of packets from the current position of the file."""
        self._buffer = PacketBuffer(
            self._container.demux()
            if self._missing.needs_all_streams
            else self._container.demux(self._stream)
        )
        if self._targets is None:
            return self._buffer
        return FrameSkipper(self._buffer, self._stream, self._targets)

    def _next_packet(self) -> Packet[Any] | None:
        """Return the next readable packet of the stream; None if there are no more."""
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
                # PyAV ends this way if streams appeared after opening, without the empty packet
                # that flushes the decoder.
                packet = Packet()
                packet.stream = self._stream
                self._packets = iter(())
            if packet is not None and self._missing.lie_before(packet):
                self._lose("packets are missing")
            if packet is None or packet.stream is self._stream:
                if packet is not None and packet.size and self._counted is not None:
                    packet.pts = packet.dts = self._counted
                    self._counted += packet.duration or self.step
                return packet
        return None

    def _lose(self, reason: str) -> None:
        """Record that packets are missing."""
        self._sent += 1
        self._add_damage(self._sent, reason, lost=True)

    def _add(self, frame: VideoFrame) -> None:
        """Add a frame from the decoder to the queue."""
        time = frame.dts if frame.pts is None or self._ordered else frame.pts
        if time is None:  # the frame came out at the end of the file, after the last packet
            self.first_is_late |= self._latest is None
            time = 0 if self._latest is None else self._latest + self.step
        self._account(time)
        number = own = self._numbers.get(time)  # of the frame's packet
        if self._ordered:
            own = None if frame.pts is None else self._owners.pop(frame.pts, None)
        shown = Shown(frame, time, self._sent if number is None else number)
        if self._latest is None and not frame.key_frame and self._makes_up:
            self._add_damage(0, "it begins without a key frame")
        if self._latest is not None and time < self._latest:
            self._add_damage(shown.number, "the times of its frames go back", lost=True)
        self._latest = time
        if frame.is_corrupt:
            self._add_damage(shown.number - _MOST_AHEAD if own is None else own, "it has errors")
        elif frame.key_frame and own is not None and self._counted is None:
            # An intact key frame ends the damage. Not where packets are counted: damage may have
            # merged packets, so all later times may be wrong.
            for damage in self._damages:
                if damage.restored is None and damage.first < own - self.delay:
                    damage.restored = time
        self._ready.append(shown)

    def _is_skipped(self, packet: Packet[Any]) -> bool:
        """Tell if the decoder skips a packet: its frame is neither wanted nor a reference."""
        if self._targets is None or self._stream.codec_context.skip_frame == "DEFAULT":
            return False
        return is_unreferenced(self._stream, bytes(packet))

    def _account(self, time: int) -> None:
        """Record packets that gave no frame, once a later frame is out."""
        self._expected.pop(time, None)
        if self._expected and min(self._expected) < time:
            overdue = [number for at, number in self._expected.items() if at < time]
            if self._latest is not None:  # the first packets may need earlier ones
                self._add_damage(min(overdue), "a packet gave no frame")
            self._expected = {at: number for at, number in self._expected.items() if at > time}

    @property
    def step(self) -> int:
        """Average number of ticks from one frame to the next."""
        rate, tick = self._stream.guessed_rate, self._stream.time_base
        if not rate or not tick:
            raise VideoError(self._name, "its header lacks the frame rate")
        return max(1, round(1 / (rate * tick)))

    def _add_damage(self, first: int, reason: str, *, lost: bool = False) -> None:
        """Record damage, unless recorded damage already extends to the same key frame."""
        self.reason = self.reason or reason
        for damage in self._damages:
            if damage.restored is None and self._key <= damage.first <= first:
                damage.lost |= lost
                return
        self._damages.append(_Damage(first, lost))
