"""Checks of decoding: every node must decode a test video, and the user's, as the driver does."""

import io
import time
from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.core.storage import absolute, is_folder, join
from pipelines.data.shards import FOLDER, open_video, read_manifest, video_uri
from pipelines.data.videos import find_sources
from pipelines.diagnostics.findings import Finding, fail, ok, reason
from pipelines.diagnostics.nodes import Answer, Cluster, Node
from re2tal.errors import UserError
from re2tal.videos.encoding import encode
from re2tal.videos.pieces import decode_source

_SIDE, _FRAMES, _FPS = 112, 96, 12
_TIMES = (np.arange(_FRAMES) + 0.5) / _FPS
_LOSS = 8.0  # largest accepted mean error of the codec in grey levels; it is 1.3 in fact
_OWN_TIMES = np.arange(8) / 8  # within the first second, which every video has

Decoded = tuple[np.ndarray, float]
"""Frames of a video, RGB, uint8 (T, H, W, 3), and the seconds that decoding them took."""


def pictures() -> Iterator[np.ndarray]:
    """Draw the frames of the test video: moving waves of colour, RGB, uint8 (H, W, 3)."""
    y, x = np.mgrid[:_SIDE, :_SIDE] * (2 * np.pi / _SIDE)
    for number in range(_FRAMES):
        turn = 2 * np.pi * number / _FRAMES
        waves = [np.sin(x + turn), np.sin(y - turn), np.cos(x + y + 2 * turn)]
        yield (127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def make_video() -> bytes:
    """Encode `pictures` as an H.264 mp4."""
    file = io.BytesIO()
    encode(file, pictures(), fps=_FPS)
    return file.getvalue()


def decode(_: Node, video: bytes | str, times: np.ndarray) -> Decoded:
    """Decode frames of a video with the reader that training uses.

    The video is the content of a file, or the path or URI of a file or of a video in a shard.
    """

    def read(times: np.ndarray) -> np.ndarray:
        source = video if isinstance(video, bytes) else open_video(video)
        return decode_source(source, times, size=_SIDE)

    read(times[:1])  # warm-up: loading libraries is not timed
    began = time.perf_counter()
    return read(times), time.perf_counter() - began


def check_video(cluster: Cluster) -> list[Finding]:
    """Check that the driver decodes what it encoded, and that every node gets the same frames."""
    again = "Install PyAV anew: `pip install --force-reinstall av`, in the range of pyproject.toml."
    first, *others = cluster.ask_after_driver(decode, make_video(), _TIMES)
    if first.value is None:
        return [fail(f"The driver cannot decode a video that it made: {first.error}. {again}")]
    frames, expected = first.value[0], np.stack(list(pictures()))
    if frames.shape != expected.shape or np.abs(frames.astype(np.int16) - expected).mean() > _LOSS:
        text = f"The driver does not decode what it encoded ({_difference(frames, expected)})"
        return [fail(f"{text}. {again}")]
    slowest = max(one.value[1] for one in (first, *others) if one.value)
    text = f"The same frames of a test video ({_SIDE} pixels, H.264) for {cluster.everyone}"
    well = ok(f"{text}; at least {_FRAMES / slowest:.0f} frames/s in one thread.")
    return _compare("the test video", frames, others) or [well]


def check_own(places: Sequence[str], cluster: Cluster) -> Iterator[Finding]:
    """Check that driver and nodes decode `first_video` of each place to the same frames."""
    for place in places:
        try:
            uri = first_video(place)
        except UserError as error:
            yield fail(str(error))
            continue
        except (OSError, ValueError) as error:
            yield fail(f"--videos {place} cannot be read: {reason(error)}. Correct it.")
            continue
        first, *others = cluster.ask_after_driver(decode, uri, _OWN_TIMES)
        if first.value is None:
            text = f"The driver cannot decode the first video of {place}: {first.error}. Repair or "
            yield fail(f"{text}remove it; probe.py checks all videos.")
        else:
            well = [ok(f"The same frames of {uri} for {cluster.everyone}.")]
            yield from _compare(uri, first.value[0], others) or well


def first_video(place: str) -> str:
    """Return the path or URI of the first video of a file, folder, pattern or folder of shards.

    Raises:
        UserError: if there is none, or the shards' manifest is damaged.
    """
    folder = absolute(place)
    manifest = read_manifest(folder) if is_folder(folder) else None
    if manifest is None:
        return next(iter(find_sources([place], option="--videos").values()))
    for shard in manifest.shards:
        for video_id in shard.videos:
            return video_uri(join(join(folder, FOLDER), shard.name), video_id)
    raise UserError(f"The videos: the shards in {place} hold none. Correct --videos.")


def _compare(name: str, expected: np.ndarray, answers: Sequence[Answer[Decoded]]) -> list[Finding]:
    """Return a failure for each node that decodes a video to other frames than the driver."""
    findings = []
    for answer in answers:
        who = answer.node.name
        if answer.value is None:
            text = f"{who} cannot decode {name}: {answer.error}. It must be readable there, and the"
            findings.append(fail(f"{text} node needs the packages of requirements.txt."))
        elif not np.array_equal(answer.value[0], expected):
            text = f"{who} decodes {name} to other frames than the driver ("
            text += f"{_difference(answer.value[0], expected)}). Install the same version of "
            findings.append(fail(f"{text}PyAV (av) on both, for the same processors."))
    return findings


def _difference(frames: np.ndarray, expected: np.ndarray) -> str:
    if frames.shape != expected.shape:
        return f"shape {frames.shape} instead of {expected.shape}"
    apart = np.abs(frames.astype(np.int16) - expected)
    return f"up to {apart.max()} grey levels apart, in {(apart > 0).mean():.1%} of the values"
