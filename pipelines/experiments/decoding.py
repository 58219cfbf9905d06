"""Experiment `decoding`: speed of re2tal's decoder and of others that can be imported."""

import importlib
import importlib.metadata
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np

from pipelines.experiments.experiment import Row, Tables
from pipelines.experiments.footage import HEIGHT, WIDTH, Footage
from pipelines.experiments.timing import in_turns, quartiles, ratios
from re2tal.videos.decoding import decode


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Frames of a video with a constant frame rate, by their indices."""

    path: Path
    fps: int
    indices: np.ndarray  # ascending, (T,)
    size: tuple[int, int] | None  # width and height after scaling; None for the original size
    threads: int


Decoder = Callable[[Request], np.ndarray]
"""Function that opens the file and returns RGB frames, uint8 of shape (T, H, W, 3)."""

OURS = "re2tal"


def available() -> tuple[dict[str, Decoder], list[dict[str, str]]]:
    """Load the decoders that can be imported, and tabulate the versions of all decoders."""
    decoders: dict[str, Decoder] = {OURS: _ours}
    libraries = av.library_versions
    note = f"PyAV {av.__version__}, libavcodec {'.'.join(map(str, libraries['libavcodec']))}"
    rows = [{"decoder": OURS, "version": note}]
    for package, load in _PEERS.items():
        try:
            decoders |= load()
        except (ImportError, OSError, RuntimeError) as error:  # without FFmpeg's libraries
            reason = str(error).strip().splitlines()[0]
            rows.append({"decoder": package, "version": f"left out: {reason}"})
        else:
            rows.append({"decoder": package, "version": importlib.metadata.version(package)})
    return decoders, rows


def _ours(request: Request) -> np.ndarray:
    return decode(
        request.path,
        (request.indices + 0.5) / request.fps,
        size=min(request.size) if request.size else None,
        threads=request.threads,
    )


def _decord() -> dict[str, Decoder]:
    decord: Any = importlib.import_module("decord")

    def read(request: Request) -> np.ndarray:
        width, height = request.size or (-1, -1)
        reader = decord.VideoReader(
            str(request.path), num_threads=request.threads, width=width, height=height
        )
        frames: np.ndarray = reader.get_batch(request.indices).asnumpy()
        return frames

    return {"decord": read}


def _torchcodec() -> dict[str, Decoder]:
    decoders: Any = importlib.import_module("torchcodec.decoders")
    transforms: Any = importlib.import_module("torchcodec.transforms")

    def read(request: Request, *, seek_mode: str) -> np.ndarray:
        decoder = decoders.VideoDecoder(
            request.path,
            dimension_order="NHWC",
            num_ffmpeg_threads=request.threads,
            seek_mode=seek_mode,
            transforms=[transforms.Resize(request.size[::-1])] if request.size else None,
        )
        frames: np.ndarray = decoder.get_frames_at(request.indices.tolist()).data.numpy()
        return frames

    return {
        f"torchcodec, {mode}": partial(read, seek_mode=mode) for mode in ("exact", "approximate")
    }


_PEERS: Mapping[str, Callable[[], dict[str, Decoder]]] = {
    "decord": _decord,
    "torchcodec": _torchcodec,
}


FOOTAGE = (
    Footage(title="key frames up to 250 apart", gop=250),
    Footage(title="key frames up to 30 apart", gop=30),
)

SCALED = (284, 160)  # of 640 x 360, when the short side is scaled to training's usual 160
SETTINGS = ((1, SCALED), (1, None), (2, SCALED))  # threads, and size of the frames


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Pattern of frames in one or more requests that are measured together."""

    title: str
    frames: int  # of a request
    requests: int
    evenly: bool  # evenly over the whole video; otherwise consecutive frames

    def indices(self, frames: int, random: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield each request's indices in a video of `frames` frames, at random if consecutive."""
        for _ in range(self.requests):
            if self.evenly:
                yield np.floor((np.arange(self.frames) + 0.5) * frames / self.frames).astype(int)
            else:
                yield random.integers(frames - self.frames + 1) + np.arange(self.frames)


ACCESSES = (
    Access(title="768 of the whole video", frames=768, requests=1, evenly=True),
    Access(title="256 that follow one another", frames=256, requests=4, evenly=False),
)


def measure_decoding(*, seconds: int = 120, rounds: int = 7) -> Tables:
    """Frames per second of decoders, from opening the file to the array of frames.

    In each round, all decoders read the same frames of the same file in the same process, in an
    order that rotates from round to round. A ratio is the median over rounds of a decoder's time
    divided by re2tal's: above 1, re2tal is faster.

    Args:
        seconds: length of the videos.
        rounds: number of counted rounds, after a warm-up round.
    """
    decoders, versions = available()
    tables: Tables = {"What is compared": list[Row](versions), "Videos": []}
    with tempfile.TemporaryDirectory() as folder:
        for number, footage in enumerate(FOOTAGE):
            path = Path(folder) / f"{number}.mp4"
            footage.write(path, seconds * footage.fps)
            tables["Videos"].append(described(path, footage))
            whole = Request(path=path, fps=footage.fps, indices=np.array([]), size=None, threads=1)
            for threads, size in SETTINGS:
                shape = "x".join(map(str, size or (WIDTH, HEIGHT)))
                rows = tables.setdefault(f"Frames of {shape}, threads: {threads}", [])
                request = replace(whole, size=size, threads=threads)
                for access in ACCESSES:
                    for row in compared(decoders, request, access, seconds, rounds):
                        rows.append({"video": footage.title, "frames": access.title, **row})
    return tables


def described(path: Path, footage: Footage) -> Row:
    """Describe a video, and the number of processors for decoding it."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.skip_frame = "NONREF"
        leaned_on = sum(1 for _ in container.decode(stream))  # reference frames only
        seconds = float((stream.duration or 0) * (stream.time_base or 0))
    return {
        "video": footage.title,
        "pixels": f"{WIDTH}x{HEIGHT}",
        "fps": footage.fps,
        "seconds": seconds,
        "kbit/s": path.stat().st_size * 8e-3 / seconds,
        "share that others lean on": leaned_on / (seconds * footage.fps),
        "processors": len(os.sched_getaffinity(0)),
    }


def compared(
    decoders: Mapping[str, Decoder], request: Request, access: Access, seconds: int, rounds: int
) -> list[Row]:
    """Compare each decoder's speed with ours in every round, and its frames by `difference`."""
    of_video = seconds * request.fps
    some = replace(request, indices=next(access.indices(of_video, np.random.default_rng(1))))
    frames = decoders[OURS](some)
    # this also serves as warm-up
    differences = {name: difference(frames, read(some)) for name, read in decoders.items()}
    del frames

    def turns(decoder: Decoder) -> Callable[[], tuple[float, float]]:
        random = np.random.default_rng(0)  # in a round, every decoder gets the same frames

        def take() -> tuple[float, float]:
            """Measure wall-clock seconds, and CPU seconds of all threads of the process."""
            drawn = list(access.indices(of_video, random))
            start, computed = time.perf_counter(), time.process_time()
            for indices in drawn:
                decoder(replace(request, indices=indices))
            return time.perf_counter() - start, time.process_time() - computed

        return take

    took = in_turns({name: turns(d) for name, d in decoders.items()}, rounds, before=0)
    ours, ours_computed = zip(*took[OURS], strict=True)
    rows = []
    for name, pairs in took.items():
        times, computed = zip(*pairs, strict=True)
        low, middle, high = quartiles(ratios(times, ours))
        rows.append(
            {
                "decoder": name,
                "frames/s": access.frames * access.requests / median(times),
                "times as long as re2tal": middle,
                "lower quartile": low,
                "upper quartile": high,
                "computes times as long": median(ratios(computed, ours_computed)),
                "difference": differences[name],
                "rounds": len(times),
                "all seconds": list(times),
            }
        )
    return rows


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Compute the mean absolute difference of frames, in grey levels.

    Raises:
        ValueError: if the shapes differ, or a frame is nearer to the frame before its counterpart
            than to the counterpart: then the decoders do not do the same work.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"Frames of shapes {ours.shape} and {theirs.shape} cannot be compared.")
    some = np.linspace(1, len(ours) - 1, 32).astype(int)
    reference = ours[some].astype(np.int16)
    same = np.abs(reference - theirs[some]).mean(axis=(1, 2, 3))
    before = np.abs(reference - theirs[some - 1]).mean(axis=(1, 2, 3))
    if not (same < before).all():
        raise ValueError("Decoders give different frames, so that their speeds cannot be compared.")
    return float(same.mean())
