"""Experiments `throughput` and `executions`: Ray Data against plain decoding, and its own cost."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import psutil
import ray
import ray.data

from pipelines.core.cluster import quiet_data
from pipelines.data.batches import stream_batches
from pipelines.data.decoding import decode_sample
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
from re2tal.datasets.toy import make_clip
from re2tal.videos.windows import Window

FOOTAGE = Footage(title="one", gop=250)

_BATCH = 2  # windows delivered at a time


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
    discards the frames where they are decoded; the pipeline delivers them, in order and in batches,
    to the requesting process. The two alternate, and the ratio is the median over the rounds. The
    start is not counted: each decodes a few windows first, to start processes and load libraries.

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
    """Start a Ray instance with `cpus` CPUs, unless one runs; stop it afterwards."""
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


_AHEAD = 8  # batches of a worker that a shared execution decodes ahead

# Parts of Ray, by substrings of their processes' command lines; all other processes decode.
_PARTS = {
    "executions": ("ray::_Stream", "ray::SplitCoordinator"),
    "GCS": ("gcs_server",),
    "raylet": ("raylet/raylet",),
    "dashboard": ("ray-dashboard", "dashboard/", "runtime_env/agent", "ray::_StatsActor"),
}


def measure_executions(
    *,
    workers: Sequence[int] = (1, 8, 32),
    windows: int = 32,
    frames: int = 16,
    size: int = 32,
    decoders: int = 8,
    step: float = 1.0,
) -> Tables:
    """CPU time and memory of Ray Data's executions: one beside each worker, or one for all.

    The workers are simulated by threads of this process, which take a batch of two windows and then
    wait for the time of a step. Either an actor beside each worker runs separate executions, as in
    training; or one execution decodes the windows of all workers and splits them in order
    (`streaming_split`), throttled when it is eight batches ahead of each worker, as the frames of
    an epoch would throttle it. All windows are taken once before, without steps, to start processes
    and load libraries. "Executions" are the scheduling processes; the dashboard includes its agents
    and Ray Data's statistics; decoding is not counted.

    Args:
        workers: numbers of workers.
        windows: number of windows of each worker.
        frames: number of frames of a window.
        size: side of the square frames in pixels.
        decoders: number of decoding processes, for all workers together.
        step: seconds for which a worker holds a batch.
    """
    seconds = 20
    with tempfile.TemporaryDirectory() as folder, _ray(decoders):
        path = Path(folder) / "video.mp4"
        path.write_bytes(make_clip("spin", seconds, seed=0).content)
        table = []
        for count in workers:
            drawn = windows_of("video", seconds, frames=frames, fps=8, count=count * windows)
            rows = [{"index": i, "uri": str(path), "window": w} for i, w in enumerate(drawn)]
            for title, way in (("beside each", _beside), ("one for all", _shared)):
                with way(rows, count, size) as take:
                    table.append(
                        {"workers": count, "executions": title, **_spent(take, count, step)}
                    )
    title = f"{windows} windows of {frames} frames, {size} pixels, for each worker"
    return {f"{title}; {decoders} decoding processes, steps of {step:g} s": table}


Take = Callable[[int, float], int]
"""Function from a worker's rank and the seconds of a step, which takes all of the worker's batches
and returns the number of windows."""


@contextmanager
def _beside(rows: list[Row], count: int, size: int) -> Iterator[Take]:
    """Let each worker take its windows from separate executions."""
    streams = [FrameStream(streams=count, cpus=1) for _ in range(count)]

    def take(rank: int, step: float) -> int:
        batches = streams[rank].batches(
            rows[rank::count], size=size, batch_size=_BATCH, name=f"worker {rank}"
        )
        return sum(_held(len(batch), step) for batch in batches)

    yield take
    for stream in streams:
        stream.close()


@contextmanager
def _shared(rows: list[Row], count: int, size: int) -> Iterator[Take]:
    """Let all workers take their windows from one execution."""
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset = dataset.map(partial(decode_sample, size=size), num_cpus=1)
    options = dataset.context.execution_options
    options.preserve_order = True
    ahead = count * _AHEAD * _BATCH * rows[0]["window"].grid.length * size * size * 3
    options.resource_limits = options.resource_limits.copy(object_store_memory=ahead)
    splits = dataset.streaming_split(count, equal=True)

    def take(rank: int, step: float) -> int:
        batches = splits[rank].iter_batches(batch_size=_BATCH)
        return sum(_held(len(batch["index"]), step) for batch in batches)

    yield take


def _held(windows: int, step: float) -> int:
    time.sleep(step)
    return windows


def _spent(take: Take, count: int, step: float) -> Row:
    """Measure the CPU time and memory of Ray's parts while `count` workers take their windows."""
    with ThreadPoolExecutor(count) as workers:
        list(workers.map(take, range(count), [0.0] * count))
        before, began = _usage(), time.perf_counter()
        taken = sum(workers.map(take, range(count), [step] * count))
        seconds = time.perf_counter() - began
        after = _usage()
    spent = {part: after[part][0] - before[part][0] for part in _PARTS}
    return {
        "windows": taken,
        "seconds": seconds,
        **{f"{part}, CPU s": value for part, value in spent.items()},
        "CPU ms a window": 1e3 * sum(spent.values()) / taken,
        "memory of executions, MB": after["executions"][1] / 1e6,
    }


def _usage() -> dict[str, tuple[float, int]]:
    """Return the CPU seconds so far and the unshared memory, in bytes, of each part of Ray."""
    found = dict.fromkeys(_PARTS, (0.0, 0))
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
            part = next((p for p, marks in _PARTS.items() if any(m in line for m in marks)), None)
            if part is not None:
                times, own = process.cpu_times(), process.memory_full_info().uss
                seconds, total = found[part]
                found[part] = (seconds + times.user + times.system, total + own)
        except psutil.NoSuchProcess:
            continue  # a decoding process that Ray has ended
    return found
