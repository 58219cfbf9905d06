"""Facts and oddities of a video file, at the cost of decoding its first and last frame."""

from dataclasses import dataclass
from fractions import Fraction

from av.stream import Disposition
from av.video.frame import VideoFrame

from re2tal.videos.conversion import quarters
from re2tal.videos.frame_queue import lacks_times
from re2tal.videos.limits import FrameError, Limits, VideoError
from re2tal.videos.reader import TAIL, Source, VideoReader

# Seconds and frames between key frames above which seeking in a video counts as slow.
_LONG = 10.0
_MANY = 300

# The end is decoded as a check if it is at most this many seconds after the last key frame.
_LONGEST_END = 30.0

# Seconds before the end at which the last packets are searched, one after the other.
_STEPS_BACK = (0.0, 2.0, 8.0, 32.0, 128.0, 512.0)

# With at most this many packets, their rate is not measured.
_ENOUGH = 4

_NO_END = "Its end cannot be decoded"

# Number of parts of a video at whose borders frames are tried if the last one cannot be decoded.
_PARTS = 8

# Share of an AVI that a complete index covers.
_COVERED = 0.9

# Seconds by which the picture may begin after the sound without a reported problem.
_LATE = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """Facts of a video.

    Attributes:
        duration: seconds until the end of the last frame in the file.
        fps: mean frames per second.
        width: width in pixels after the rotation in the metadata.
        height: height in pixels after that rotation.
        frames: number of frames; computed from duration and fps if the header has none, as in WebM.
        codec: FFmpeg's name of the codec.
        rotation: degrees, counterclockwise, by which decoded frames are rotated.
        problems: oddities of the file, one sentence each; none of them prevents decoding.
    """

    duration: float
    fps: float
    width: int
    height: int
    frames: int
    codec: str
    rotation: int
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _End:
    """Facts from the last packets; times in seconds from the first frame on."""

    last: float  # presentation time of the last frame
    end: float  # end of the last frame
    key: float | None  # presentation time of the last key frame, if any was read
    rate: float | None  # frames per second of these packets, if there are enough


def probe(source: Source, *, limits: Limits | None = None) -> VideoInfo:
    """Read the facts of a video, and decode its first and last frame as a check.

    Only the last packets are read to find the end, except in raw streams, which have no duration:
    all their packets are counted. A truncated video ends at its last packet, not where its header
    says; `problems` then contains a sentence about it.

    Args:
        source: path, content, or open binary file of the video.
        limits: limits of the cost; None for the default ones.

    Raises:
        VideoError: the file is not a video, its first frame cannot be decoded, its frame rate is
            unknown, or it exceeds the limits.
    """
    with VideoReader(source, limits=limits) as reader:
        frame = reader.frame_at(0.0)
        rate = _rate(reader)
        problems = [*_oddities(reader, frame, rate)]
        found = _find_end(source, limits)
        duration = reader.claimed or 0.0
        if found is not None:
            duration = found.end
            problems += _end_problems(reader, found)
            if found.rate and not problems and abs(found.rate / rate - 1) > 0.2:
                problems.append(
                    f"Its frame rate varies: {found.rate:.2f} fps near its end, {float(rate):.2f} "
                    "by its header."
                )
        if duration <= 0:
            raise VideoError(reader.name, "its duration is unknown")
        if any(_NO_END in problem for problem in problems):
            _require_frames(source, limits, duration, float(rate))
        frames, claims = round(duration * rate), _stored(reader) or reader.stream.frames
        if claims and abs(claims - frames) > max(1, 0.01 * frames):
            problems.append(f"Its header claims {claims} frames, but it shows about {frames}.")
        elif claims:
            frames = claims
        turned = quarters(frame) % 2
        return VideoInfo(
            duration=duration,
            fps=float(rate),
            width=frame.height if turned else frame.width,
            height=frame.width if turned else frame.height,
            frames=frames,
            codec=reader.stream.codec_context.codec.canonical_name,
            rotation=90 * quarters(frame),
            problems=tuple(problems),
        )


def _stored(reader: VideoReader) -> int:
    """Return the number of packets in an AVI's index; 0 without a complete index.

    The number of frames in the header, and the rate, may count units of time without a frame.
    """
    index, ticks = reader.stream.index_entries, reader.stream.duration
    if reader.container.format.name != "avi" or not len(index) or not ticks:
        return 0
    covered = index[len(index) - 1].timestamp - index[0].timestamp
    return len(index) if covered > _COVERED * ticks else 0


def _rate(reader: VideoReader) -> Fraction:
    """Compute the mean number of frames per second."""
    stream, stored = reader.stream, _stored(reader)
    # for raw streams, FFmpeg's average rate is a fixed number
    rate = (stream.average_rate if reader.claimed else None) or stream.guessed_rate
    if stored and rate and stream.duration and stream.time_base:
        counted = stored / (stream.duration * stream.time_base)
        rate = counted if abs(counted / rate - 1) > 0.05 else rate
    if not rate:
        raise VideoError(reader.name, "its header lacks the frame rate")
    return rate


def _find_end(source: Source, limits: Limits | None) -> _End | None:
    """Find the end of a video; None if no packet near it can be read."""
    with VideoReader(source, limits=limits) as reader:
        claimed = reader.claimed
        steps = _STEPS_BACK if reader.seekable and claimed is not None else ()
        for seconds in steps:
            wanted = (claimed or 0.0) - seconds
            if wanted > 0 and reader.seek_packets(wanted):
                found = _read_end(reader)
                if found is not None and found.key is not None:
                    return found
    # the last resort is to read the whole file
    with VideoReader(source, limits=limits) as reader:
        return _read_end(reader)


def _read_end(reader: VideoReader) -> _End | None:
    """Read all remaining packets; return None if none has a time."""
    tick = float(reader.stream.time_base or 1)
    usual = 1 / float(reader.stream.guessed_rate or 25)
    first = last = key = end = None
    packets, counted = 0, 0.0  # seconds are counted for MPEG program streams without times
    for packet in reader.packets():
        length = (0 if reader.ordered else packet.duration or 0) * tick or usual
        begin = reader.packet_time(packet)
        if begin is None and reader.seekable:
            continue
        begin = counted if begin is None else begin
        counted += length
        packets += 1
        first = begin if first is None else min(first, begin)
        if last is None or begin > last:
            last, end = begin, begin + length
        if packet.is_keyframe:
            key = begin
    if first is None or last is None or end is None:
        return None
    rate = (packets - 1) / (last - first) if packets > _ENOUGH else None
    return _End(last, end, key, rate)


def _end_problems(reader: VideoReader, found: _End) -> list[str]:
    """Decode the last frame, and describe oddities of the end of a video."""
    problems, claimed = [], reader.claimed
    if cut := reader.cut_off(found.end):
        problems.append(f"Its last frame ends at second {found.end:.2f}{cut}.")
    elif claimed is None:
        problems.append(f"Its header has no duration: its frames last {found.end:.2f} s.")
    elif abs(claimed - found.end) > TAIL:
        problems.append(
            f"Its last frame ends at second {found.end:.2f}, though its header says {claimed:.2f}."
        )
    if found.key is None or found.last - found.key > _LONGEST_END:
        problems.append("Its end was not decoded, because no key frame is near it.")
        return problems
    try:
        reader.frame_at(found.last)
    except VideoError as error:
        problems.append(f"{_NO_END}: {error.reason}.")
    return problems


def _require_frames(source: Source, limits: Limits | None, duration: float, fps: float) -> None:
    """Refuse a video if its first frame can be decoded, but none of a few later ones."""
    times = [1.5 / fps, *(duration * part / _PARTS for part in range(1, _PARTS))]
    reasons = []
    with VideoReader(source, limits=limits) as reader:
        for time in sorted(times):
            try:
                reader.frame_at(time)
            except FrameError as error:
                reasons.append(error.reason)
            else:
                return
        raise VideoError(reader.name, f"only its first frame can be decoded: {reasons[0]}")


def _oddities(reader: VideoReader, frame: VideoFrame, rate: Fraction) -> list[str]:
    """Describe oddities in the header and the first frame of a video."""
    problems = []
    if reader.ordered and not lacks_times(reader.container, reader.stream):
        problems.append("Its frame times go back: its frames are shown in the decoder's order.")
    fastest = reader.stream.base_rate
    # H.264 counts fields, of which a frame has two
    steady = fastest is not None and any(abs(n * rate / fastest - 1) < 0.05 for n in (1, 2))
    if fastest and not steady:
        problems.append(
            f"Its frame rate varies: {float(rate):.2f} fps on average, up to {float(fastest):.2f}."
        )
    if frame.interlaced_frame:
        problems.append("Its frames are interlaced; they are not deinterlaced.")
    if (late := reader.lateness) > _LATE:
        problems.append(f"Its picture begins {late:.2f} s after its sound; times count from there.")
    if any(s.disposition & Disposition.attached_pic for s in reader.container.streams.video):
        problems.append("It holds a cover picture, which is left out.")
    widest = _longest_gop(reader)
    if widest > _LONG and widest * rate > _MANY:
        problems.append(f"Its key frames are up to {widest:.0f} s apart: seeking in it is slow.")
    return problems


def _longest_gop(reader: VideoReader) -> float:
    """Compute the longest time between key frames in seconds from the index; 0 without one."""
    index = reader.stream.index_entries
    if len(index) < 2:
        return 0.0
    last = index[len(index) - 1].timestamp
    widest, key = 0, index[0].timestamp
    while (place := index.search_timestamp(key + 1, backward=False)) >= 0:
        following = index[place].timestamp
        widest, key = max(widest, following - key), following
    return float(max(widest, last - key) * (reader.stream.time_base or 1))
