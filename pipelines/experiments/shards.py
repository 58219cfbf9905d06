"""Shards: their size, and the speed with which training reads windows from them.

The same windows are decoded from the raw file and from a shard, as a decoding task does it, in one
process and with one thread. Each round measures all of them, in another order, and a ratio is the
median over the rounds.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from pipelines.data.shard_writing import ShardTask, write_shard
from pipelines.data.shards import ShardSettings, video_uri
from pipelines.experiments.experiment import Tables
from pipelines.experiments.footage import HEIGHT, WIDTH, Footage, decoded, windows_of
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


def measure(*, seconds: int = 120, rounds: int = 7, windows: int = 4, size: int = 224) -> Tables:
    """Measure sizes, and frames per second.

    Args:
        seconds: length of the video.
        rounds: number of rounds of measurements.
        windows: number of windows decoded in each round, where they do not span the whole video.
        size: side of the square frames in pixels.
    """
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / f"{_ID}.mp4"
        FOOTAGE.write(raw, seconds * FOOTAGE.fps)
        made = {title: _write(raw, title, seconds) for title in SHARDS}
        sizes = [row for row, _ in made.values()]
        uris = {_RAW: str(raw)} | {title: uri for title, (_, uri) in made.items()}
        speeds = [
            {"windows": title, **row}
            for title, (frames, fps) in SAMPLINGS.items()
            for row in _compare(
                uris,
                windows_of(_ID, seconds, frames=frames, fps=fps, count=windows),
                size=size,
                rounds=rounds,
            )
        ]
    what = f"{seconds} s of H.264, {WIDTH}x{HEIGHT}, {FOOTAGE.fps} frames/s, a key frame every 250"
    return {
        f"Size, from {what}": sizes,
        f"Reading windows of {size} pixels, one process: shards against the raw file": speeds,
    }


def _write(raw: Path, title: str, seconds: int) -> tuple[dict[str, Any], str]:
    """Write a shard; return a row about it, and the URI of the video in it."""
    settings = ShardSettings(fingerprint="", subsets=("training",), transcode=SHARDS[title])
    uri = str(raw.parent / title / "part-00000.parquet")
    task = ShardTask(
        uri=uri,
        settings=settings,
        videos=(VideoAnnotation(video_id=_ID, subset="training", duration=float(seconds)),),
        sources={_ID: str(raw)},
        missing={},
    )
    before = time.perf_counter()
    write_shard(task)
    took = time.perf_counter() - before
    before_bytes, after = raw.stat().st_size, Path(uri).stat().st_size
    row = {
        "shards": title,
        "raw, MB": before_bytes / 1e6,
        "shard, MB": after / 1e6,
        "of raw": after / before_bytes,
        "seconds of video encoded a second": seconds / took,
    }
    return row, video_uri(uri, _ID)


def _compare(
    uris: Mapping[str, str], windows: Sequence[Window], *, size: int, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each of the shards; each round measures the raw file and all of them."""
    ways = {}
    for name, uri in uris.items():
        rows = [{"index": i, "window": w, "uri": uri} for i, w in enumerate(windows)]
        decoded(rows[:1], size=size)  # libraries are loaded and the shards are open
        ways[name] = partial(_speed, rows, size)
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


def _speed(rows: Sequence[dict[str, Any]], size: int) -> float:
    before = time.perf_counter()
    frames = decoded(rows, size=size)
    return frames / (time.perf_counter() - before)
