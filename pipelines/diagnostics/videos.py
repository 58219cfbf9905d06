"""Whether every node decodes videos to the frames that the driver sees."""

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.core.storage import absolute, is_folder, join
from pipelines.data.shards import FOLDER, open_video, read_manifest, video_uri
from pipelines.data.videos import find_sources
from pipelines.diagnostics.finding import Finding, fail, ok
from pipelines.diagnostics.nodes import Answer, Node, all_of, ask
from pipelines.diagnostics.reasons import reason
from re2tal.errors import UserError
from re2tal.videos.encoding import encode
from re2tal.videos.limits import VideoError
from re2tal.videos.pieces import decode_source

CHECK = "video"
CHECK_OWN = "videos"
_SIDE, _FRAMES, _FPS = 112, 96, 12
_LOSS = 8.0  # grey levels that the codec may be off on average; it is 1.3
_OWN_TIMES = np.arange(8) / 8  # of the first second, which every video has


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Decoded:
    """What a node made of a video.

    Attributes:
        frames: RGB, uint8 (T, H, W, 3).
        seconds: that it took.
    """

    frames: np.ndarray
    seconds: float


def pictures() -> Iterator[np.ndarray]:
    """Frames of the test video: waves of colour that wander, RGB, uint8."""
    y, x = np.mgrid[:_SIDE, :_SIDE] * (2 * np.pi / _SIDE)
    for number in range(_FRAMES):
        turn = 2 * np.pi * number / _FRAMES
        waves = [np.sin(x + turn), np.sin(y - turn), np.cos(x + y + 2 * turn)]
        yield (127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def make_video() -> bytes:
    """An H.264 mp4 of `pictures`."""
    file = io.BytesIO()
    encode(file, pictures(), fps=_FPS)
    return file.getvalue()


def decode_made(content: bytes) -> Decoded:
    """Decodes the test video with the reader that training uses.

    Args:
        content: of its file.

    Raises:
        VideoError: if it cannot be decoded.
    """
    times = (np.arange(_FRAMES) + 0.5) / _FPS
    decode_source(content, times[:1], size=_SIDE)  # what is loaded once is not timed
    began = time.perf_counter()
    frames = decode_source(content, times, size=_SIDE)
    return Decoded(frames=frames, seconds=time.perf_counter() - began)


def decode_own(uri: str) -> Decoded:
    """Decodes a little of a video of the user's.

    Args:
        uri: path or URI of a file, or of a video in a shard.

    Raises:
        VideoError: if it cannot be decoded.
        OSError: if it cannot be read.
    """
    began = time.perf_counter()
    frames = decode_source(open_video(uri), _OWN_TIMES, size=_SIDE)
    return Decoded(frames=frames, seconds=time.perf_counter() - began)


def check_video(content: bytes, nodes: Sequence[Node], *, seconds: float) -> list[Finding]:
    """Has the driver and every node decode the test video.

    Args:
        content: of its file.
        nodes: of the cluster.
        seconds: to wait for them.
    """
    try:
        here = decode_made(content)
    except VideoError as error:
        return [fail(CHECK, f"The driver cannot decode a video that it made: {error}. {_ADVICE}")]
    expected = np.stack(list(pictures()))
    if here.frames.shape != expected.shape:
        text = f"The driver decodes frames of shape {here.frames.shape} instead of {expected.shape}"
        return [fail(CHECK, f"{text}. {_ADVICE}")]
    loss = float(np.abs(here.frames.astype(np.int16) - expected).mean())
    if loss > _LOSS:
        text = f"What the driver decodes is {loss:.0f} grey levels off what it encoded. {_ADVICE}"
        return [fail(CHECK, text)]
    answers = ask(nodes, decode_made, content, seconds=seconds)
    failures = compare(CHECK, "the test video", here.frames, answers)
    return failures or [ok(CHECK, _speeds(here, answers))]


_ADVICE = "Install PyAV anew: `pip install --force-reinstall av`, in the range of pyproject.toml."


def check_own(places: Sequence[str], nodes: Sequence[Node], *, seconds: float) -> list[Finding]:
    """Has the driver and every node decode the first video of each place.

    Args:
        places: files, folders, patterns or folders of shards; paths or URIs.
        nodes: of the cluster.
        seconds: to wait for them.
    """
    findings = []
    for place in places:
        try:
            uri = first_video(place)
            here = decode_own(uri)
        except UserError as error:
            findings.append(fail(CHECK_OWN, str(error)))
        except (VideoError, OSError, ValueError) as error:
            text = f"The driver cannot decode the first video of {place}: {reason(error)}. Mend or "
            findings.append(fail(CHECK_OWN, f"{text}remove it; probe.py tells of all of them."))
        else:
            answers = ask(nodes, decode_own, uri, seconds=seconds)
            well = [ok(CHECK_OWN, f"{_alike(len(answers), uri)}.")]
            findings += compare(CHECK_OWN, uri, here.frames, answers) or well
    return findings


def first_video(place: str) -> str:
    """Finds a video.

    Args:
        place: a file, folder, pattern or folder of shards; a path or URI.

    Raises:
        UserError: if there is none; if the shards' manifest is damaged.
    """
    folder = absolute(place)
    manifest = read_manifest(folder) if is_folder(folder) else None
    if manifest is None:
        return next(iter(find_sources([place], option="--videos").values()))
    for shard in manifest.shards:
        for video_id in shard.videos:
            return video_uri(join(join(folder, FOLDER), shard.name), video_id)
    raise UserError(f"The videos: the shards in {place} hold none. Correct --videos.")


def compare(
    check: str, name: str, expected: np.ndarray, answers: Sequence[Answer[Decoded]]
) -> list[Finding]:
    """Compares what the nodes decoded with what the driver did.

    Args:
        check: its name.
        name: of the video.
        expected: frames of the driver.
        answers: of the nodes.

    Returns:
        Failures; none if all is well.
    """
    findings = []
    for answer in answers:
        who = answer.node.name
        if answer.value is None:
            text = (
                f"{who} cannot decode {name}: {answer.error}. It must be readable there, and the "
            )
            findings.append(fail(check, f"{text}node needs the packages of requirements.txt."))
        elif not np.array_equal(answer.value.frames, expected):
            text = f"{who} decodes {name} to other frames than the driver ("
            text += f"{_difference(answer.value.frames, expected)}). Install the same version of "
            findings.append(fail(check, f"{text}PyAV (av) on both, for the same processors."))
    return findings


def _difference(frames: np.ndarray, expected: np.ndarray) -> str:
    if frames.shape != expected.shape:
        return f"shape {frames.shape} instead of {expected.shape}"
    apart = np.abs(frames.astype(np.int16) - expected)
    return f"up to {apart.max()} grey levels apart, in {(apart > 0).mean():.1%} of the values"


def _speeds(here: Decoded, answers: Sequence[Answer[Decoded]]) -> str:
    every = [here, *(answer.value for answer in answers if answer.value is not None)]
    speeds = [len(one.frames) / one.seconds for one in every]
    shown = f"{min(speeds):.0f}" if len(speeds) == 1 else f"{min(speeds):.0f} to {max(speeds):.0f}"
    video = f"a test video ({_SIDE} pixels, H.264)"
    return f"{_alike(len(answers), video)}; {shown} frames/s in one thread."


def _alike(nodes: int, video: str) -> str:
    if not nodes:
        return f"The driver decodes {video}"
    return f"The driver and {all_of(nodes)} decode the same frames of {video}"
