"""Experiment `throughput`: Ray Data, against plain decoding."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import ray

from pipelines.core.cluster import quiet_data
from pipelines.data.batches import stream_batches
from pipelines.data.streaming import FrameStream
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
from re2tal.videos.windows import Window

FOOTAGE = Footage(title="one", gop=250)

_BATCH = 2  # windows that are delivered at a time


def measure_throughput(
    *,
    processes: Sequence[int] = (1, 2),
    rounds: int = 7,
    seconds: int = 60,
    windows: int = 48,
    frames: int = 256,
    size: int = 160,
) -> Tables:
    """Frames a second that Ray Data delivers to a worker, against plain decoding.

    Both decode the same windows in the same number of processes, one thread each. Plain decoding
    drops the frames where they are decoded; the pipeline hands them, in order and in batches, to
    the process that asked. Rounds alternate, and the ratio is the median over the pairs. The start
    is not counted: each decodes a few windows first, so that processes run and libraries are
    loaded.

    Args:
        processes: numbers of decoding processes.
        rounds: number of pairs of measurements.
        seconds: length of the video.
        windows: number of windows, at random places of the video.
        frames: number of consecutive frames of each window.
        size: side of the square frames in pixels.
    """
    fps = float(FOOTAGE.fps)
    drawn = windows_of("video", seconds, frames=frames, fps=fps, count=windows)
    title = f"{windows} windows of {frames} frames, H.264 {WIDTH}x{HEIGHT}, to {size} pixels"
    with tempfile.TemporaryDirectory() as folder, _ray(max(processes)):
        path = Path(folder) / "video.mp4"
        FOOTAGE.write(path, seconds * FOOTAGE.fps)
        return {title: [_compare(str(path), drawn, size, n, rounds) for n in processes]}


@contextmanager
def _ray(cpus: int) -> Iterator[None]:
    """Start a Ray instance with that number of CPUs, unless there is one; end it afterwards."""
    began = not ray.is_initialized()
    if began:
        ray.init(address="local", num_cpus=cpus, logging_level="ERROR", log_to_driver=False)
        quiet_data()
    yield
    if began:
        ray.shutdown()


def _compare(path: str, windows: list[Window], size: int, processes: int, rounds: int) -> Row:
    stream = FrameStream(cpus=ray.cluster_resources()["CPU"] / processes)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:

        def plain(windows: list[Window]) -> int:
            return sum(pool.map(partial(decoded, path, size=size), ([one] for one in windows)))

        def pipeline(windows: list[Window]) -> int:
            uris = {"video": path}
            batches = stream_batches(stream, windows, uris, size=size, batch_size=_BATCH)
            return sum(batch.mask.numel() for batch in batches)

        ways: dict[str, Callable[[list[Window]], int]] = {"plain": plain, "pipeline": pipeline}
        for way in ways.values():
            way(windows[: 4 * processes])
        turns = {n: partial(frames_a_second, partial(way, windows)) for n, way in ways.items()}
        speeds = in_turns(turns, rounds, before=0)
    stream.close()
    found = ratios(speeds["pipeline"], speeds["plain"])
    return {
        "processes": processes,
        **{f"{name}, frames/s": median(of_way) for name, of_way in speeds.items()},
        "ratio": median(found),
        "ratios": found,
    }
