"""Experiment `shards`: size and reading speed of shards, against raw files."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from pipelines.data.shard_writing import ShardTask, write_shard
from pipelines.data.shards import ShardSettings, video_uri
from pipelines.experiments.experiment import Row, Tables
from pipelines.experiments.footage import (
    HEIGHT,
    WIDTH,
    Footage,
    decoded,
    frames_a_second,
    windows_of,
)
from pipelines.experiments.timing import in_turns, ratios
from re2tal.annotations import VideoAnnotation
from re2tal.videos.transcoding import TranscodeConfig
from re2tal.videos.windows import Window

FOOTAGE = Footage(title="raw", gop=250)

_ID, _RAW = "video", "raw"

SHARDS: Mapping[str, TranscodeConfig] = {
    "256 pixels, a key frame every 32 (default)": TranscodeConfig(),
    "every 16": TranscodeConfig(gop=16),
    "quality 28": TranscodeConfig(quality=28),
    "15 frames a second": TranscodeConfig(fps=15.0),
}


SAMPLINGS: Mapping[str, tuple[int, float | None]] = {
    "256 consecutive frames": (256, float(FOOTAGE.fps)),
    "256 frames at 15 frames/s": (256, 15.0),
    "768 frames of the whole video": (768, None),
}
"""Frames of a window, and frames per second; None spreads them over the whole video."""


def measure_shards(
    *, seconds: int = 120, rounds: int = 7, windows: int = 4, size: int = 224
) -> Tables:
    """Shards: their size, and the speed with which training reads windows from them.

    The same windows are decoded from the raw file and from shards, as in a decoding task, in one
    process with one thread. Each round measures all of them in another order; a ratio is the median
    over the rounds.

    Args:
        seconds: length of the video.
        rounds: number of rounds of measurements.
        windows: number of windows decoded in each round, unless they span the whole video.
        size: side of the square frames in pixels.
    """
    speeds: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / f"{_ID}.mp4"
        FOOTAGE.write(raw, seconds * FOOTAGE.fps)
        uris = {title: str(raw.parent / title / "part-00000.parquet") for title in SHARDS}
        sizes = [_write(raw, uri, title, seconds) for title, uri in uris.items()]
        places = {_RAW: str(raw)} | {title: video_uri(uri, _ID) for title, uri in uris.items()}
        for title, (frames, fps) in SAMPLINGS.items():
            drawn = windows_of(_ID, seconds, frames=frames, fps=fps, count=windows)
            rows = _compare(places, drawn, size=size, rounds=rounds)
            speeds += [{"windows": title, **row} for row in rows]
    what = f"{seconds} s of H.264, {WIDTH}x{HEIGHT}, {FOOTAGE.fps} frames/s, a key frame every 250"
    return {
        f"Size, from {what}": sizes,
        f"Reading windows of {size} pixels, one process: shards against the raw file": speeds,
    }


def _write(raw: Path, uri: str, title: str, seconds: int) -> Row:
    """Write a shard of the raw video; return a row with its size and speed of encoding."""
    task = ShardTask(
        uri=uri,
        settings=ShardSettings(fingerprint="", subsets=("training",), transcode=SHARDS[title]),
        videos=(VideoAnnotation(video_id=_ID, subset="training", duration=float(seconds)),),
        sources={_ID: str(raw)},
        missing={},
    )
    before = time.perf_counter()
    write_shard(task)
    took = time.perf_counter() - before
    before_bytes, after = raw.stat().st_size, Path(uri).stat().st_size
    return {
        "shards": title,
        "raw, MB": before_bytes / 1e6,
        "shard, MB": after / 1e6,
        "of raw": after / before_bytes,
        "seconds of video encoded a second": seconds / took,
    }


def _compare(
    uris: Mapping[str, str], windows: Sequence[Window], *, size: int, rounds: int
) -> list[Row]:
    """Tabulate the reading speed of each shard; each round measures the raw file and all shards."""
    ways = {}
    for name, uri in uris.items():
        decoded(uri, windows[:1], size=size)  # warm-up: loads libraries and opens shards
        ways[name] = partial(frames_a_second, partial(decoded, uri, windows, size=size))
    speeds = in_turns(ways, rounds, before=0)
    raw = speeds.pop(_RAW)
    return [
        {
            "shards": name,
            "raw, frames/s": median(raw),
            "shards, frames/s": median(of_shards),
            "ratio": median(ratios(of_shards, raw)),
            "ratios": ratios(of_shards, raw),
        }
        for name, of_shards in speeds.items()
    ]
