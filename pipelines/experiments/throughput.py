"""Frames a second that Ray Data delivers to a worker, against plain decoding.

Both decode the same windows in as many processes, one thread each. Plain decoding drops the frames
where they are made; the pipeline hands them, in order and in batches, to the process that asked.
Rounds alternate, and the ratio is the median over the pairs. What both leave out is the start:
each decodes a few windows first, so that processes run and libraries are loaded.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray

from pipelines.core.cluster import quiet_data
from pipelines.data.batches import stream_batches
from pipelines.data.decoding import decode_sample
from pipelines.data.streaming import FrameStream
from pipelines.experiments.benchmarking import Tables
from re2tal.videos.encoding import encode
from re2tal.videos.timegrid import TimeGrid
from re2tal.videos.windows import Window


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Windows of consecutive frames at random places of a video.

    Attributes:
        width, height: of the video, in pixels.
        seconds: its length, at 25 frames a second.
        windows: their number.
        frames: of each window.
        size: pixels of the square frames.
        batch_size: windows that are delivered at a time.
    """

    width: int = 640
    height: int = 360
    seconds: int = 60
    windows: int = 48
    frames: int = 256
    size: int = 160
    batch_size: int = 2

    def write(self, path: Path) -> None:
        """Makes the video: a texture that moves under noise."""
        random = np.random.default_rng(0)
        margin = 64
        shape = (self.height // 4 + margin, self.width // 4 + margin, 3)
        texture = random.integers(0, 224, shape, np.uint8).repeat(4, 0).repeat(4, 1)

        def pictures() -> Iterator[np.ndarray]:
            for number in range(self.seconds * 25):
                top, left = (number * 3) % (4 * margin), (number * 2) % (4 * margin)
                cut = texture[top : top + self.height, left : left + self.width]
                yield cut + random.integers(0, 16, cut.shape, np.uint8)

        encode(path, pictures(), fps=25, quality=26)

    def draw(self, video_id: str) -> list[Window]:
        """The windows, all of whose frames are of the video."""
        random = np.random.default_rng(1)
        last = self.seconds - self.frames / 25
        return [
            Window(
                video_id=video_id,
                grid=TimeGrid(fps=25.0, stride=2, length=self.frames, offset=float(offset)),
                valid=self.frames,
                segments=np.zeros((0, 2), np.float32),
                labels=np.zeros(0, np.int64),
            )
            for offset in random.uniform(0, last, self.windows)
        ]


def measure(
    processes: Sequence[int] = (1, 2), rounds: int = 7, load: Workload | None = None
) -> Tables:
    """A row for each number of decoding processes.

    Args:
        processes: numbers of decoding processes.
        rounds: pairs of measurements.
        load: what is decoded.
    """
    load = load or Workload()
    title = (
        f"{load.windows} windows of {load.frames} frames, H.264 {load.width}x{load.height}, "
        f"to {load.size} pixels"
    )
    with tempfile.TemporaryDirectory() as folder, _ray(max(processes)):
        path = Path(folder) / "video.mp4"
        load.write(path)
        return {title: [_compare(load, str(path), number, rounds) for number in processes]}


@contextmanager
def _ray(cpus: int) -> Iterator[None]:
    """A Ray instance of as many CPUs, unless there is one."""
    began = not ray.is_initialized()
    if began:
        ray.init(address="local", num_cpus=cpus, logging_level="ERROR", log_to_driver=False)
        quiet_data()
    yield
    if began:
        ray.shutdown()


def _compare(load: Workload, path: str, processes: int, rounds: int) -> dict[str, Any]:
    windows = load.draw("video")
    stream = FrameStream(cpus=ray.cluster_resources()["CPU"] / processes)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        ways: dict[str, Callable[[list[Window]], int]] = {
            "plain": partial(_decode_plainly, load, path, pool),
            "pipeline": partial(_deliver, load, path, stream),
        }
        for way in ways.values():
            way(windows[: 4 * processes])
        speeds = [{name: _speed(way, windows) for name, way in ways.items()} for _ in range(rounds)]
    stream.close()
    ratios = [speed["pipeline"] / speed["plain"] for speed in speeds]
    return {
        "processes": processes,
        **{f"{name}, frames/s": median(speed[name] for speed in speeds) for name in ways},
        "ratio": median(ratios),
        "ratios": ratios,
    }


def _speed(way: Callable[[list[Window]], int], windows: list[Window]) -> float:
    before = time.perf_counter()
    frames = way(windows)
    return frames / (time.perf_counter() - before)


def _decode_plainly(
    load: Workload, path: str, pool: ProcessPoolExecutor, windows: list[Window]
) -> int:
    rows = [{"index": i, "uri": path, "window": window} for i, window in enumerate(windows)]
    return sum(pool.map(partial(_count_decoded, size=load.size), rows))


def _count_decoded(row: dict[str, Any], *, size: int) -> int:
    sample = decode_sample(row, size=size)
    if sample["error"]:
        raise RuntimeError(sample["error"])
    return len(sample["frames"])


def _deliver(load: Workload, path: str, stream: FrameStream, windows: list[Window]) -> int:
    batches = stream_batches(
        stream, windows, {"video": path}, size=load.size, batch_size=load.batch_size
    )
    return sum(batch.mask.numel() for batch in batches)
