"""What shards take and give: their size, and how fast training reads windows from them.

The same windows are decoded from the raw file and from a shard, as a decoding task does it, in one
process and with one thread. Each round measures all of them, in another order, and a ratio is the
median over the rounds.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pipelines.data.decoding import decode_sample
from pipelines.data.shard_writing import ShardTask, write_shard
from pipelines.data.shards import ShardSettings, video_uri
from re2tal.annotations import VideoAnnotation
from pipelines.experiments.benchmarking import Tables
from pipelines.experiments.footage import HEIGHT, WIDTH, Footage
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.transcoding import TranscodeConfig
from re2tal.videos.windows import Window

FOOTAGE = Footage(title="raw", gop=250)

_ID = "video"

SHARDS: Mapping[str, TranscodeConfig] = {
    "256 pixels, a key frame every 32 (default)": TranscodeConfig(),
    "every 16": TranscodeConfig(gop=16),
    "quality 28": TranscodeConfig(quality=28),
    "15 frames a second": TranscodeConfig(fps=15.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Which frames a window takes.

    Attributes:
        title: In a few words.
        frames: Their number.
        fps: Frames per second; None spreads them over the whole video.
    """

    title: str
    frames: int
    fps: float | None

    def draw(self, seconds: float, count: int) -> list[Window]:
        """Windows at random places of a video."""
        fps = self.fps or self.frames / seconds
        last = max(0.0, seconds - self.frames / fps)
        offsets = np.random.default_rng(1).uniform(0, last, count) if last else np.zeros(1)
        return [
            Window(
                video_id=_ID,
                grid=TimeGrid(fps=fps, stride=2, length=self.frames, offset=float(offset)),
                valid=self.frames,
                segments=np.zeros((0, 2), np.float32),
                labels=np.zeros(0, np.int64),
            )
            for offset in offsets
        ]


SAMPLINGS = (
    Sampling(title="256 consecutive frames", frames=256, fps=float(FOOTAGE.fps)),
    Sampling(title="256 frames at 15 frames/s", frames=256, fps=15.0),
    Sampling(title="768 frames of the whole video", frames=768, fps=None),
)


def measure(seconds: int = 120, rounds: int = 7, windows: int = 4, size: int = 224) -> Tables:
    """Two tables: sizes, and frames per second.

    Args:
        seconds: length of the video.
        rounds: pairs of measurements.
        windows: decoded in each of them, where they do not span the whole video.
        size: pixels of the square frames.
    """
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / f"{_ID}.mp4"
        FOOTAGE.write(raw, seconds * FOOTAGE.fps)
        made = {title: _write(raw, title, seconds) for title in SHARDS}
        sizes = [row for row, _ in made.values()]
        uris = {title: uri for title, (_, uri) in made.items()}
        speeds = [
            row
            for sampling in SAMPLINGS
            for row in _compare(
                sampling.title, str(raw), uris, _rows(sampling.draw(seconds, windows), size), rounds
            )
        ]
    what = f"{seconds} s of H.264, {WIDTH}x{HEIGHT}, {FOOTAGE.fps} frames/s, a key frame every 250"
    return {
        f"Size, from {what}": sizes,
        f"Reading windows of {size} pixels, one process: shards against the raw file": speeds,
    }


def _write(raw: Path, title: str, seconds: int) -> tuple[dict[str, Any], str]:
    """Writes a shard; a row about it, and the URI of the video in it."""
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


def _rows(windows: Sequence[Window], size: int) -> list[dict[str, Any]]:
    return [{"index": i, "window": window, "size": size} for i, window in enumerate(windows)]


def _compare(
    title: str,
    raw: str,
    uris: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for each of the shards; each round measures the raw file and all of them."""
    ways = {"raw": raw, **uris}
    for uri in ways.values():  # libraries are loaded and the shards are open
        _speed(uri, rows[:1])
    speeds = []
    for number in range(rounds):
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        speeds.append({name: _speed(ways[name], rows) for name in order})
    table = []
    for name in uris:
        ratios = [speed[name] / speed["raw"] for speed in speeds]
        table.append(
            {
                "windows": title,
                "shards": name,
                "raw, frames/s": median(speed["raw"] for speed in speeds),
                "shards, frames/s": median(speed[name] for speed in speeds),
                "ratio": median(ratios),
                "ratios": ratios,
            }
        )
    return table


def _speed(uri: str, rows: Sequence[Mapping[str, Any]]) -> float:
    before, frames = time.perf_counter(), 0
    for row in rows:
        sample = decode_sample({**row, "uri": uri}, size=row["size"])
        if sample["error"]:
            raise RuntimeError(sample["error"])
        frames += len(sample["frames"])
    return frames / (time.perf_counter() - before)
