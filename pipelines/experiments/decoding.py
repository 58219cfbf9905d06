"""Frames per second of decoders, from opening the file to the array of frames."""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import av
import numpy as np

from pipelines.experiments.benchmarking import Row, Tables
from pipelines.experiments.decoders import OURS, Decoder, Request, available
from pipelines.experiments.footage import HEIGHT, WIDTH, Footage

FOOTAGE = (
    Footage(title="key frames up to 250 apart", gop=250),
    Footage(title="key frames up to 30 apart", gop=30),
)

# The short side that training asks for most, and what it makes of the long one.
SCALED = (284, 160)

# Threads and size of the frames.
SETTINGS = ((1, SCALED), (1, None), (2, SCALED))


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Which frames are asked for.

    Attributes:
        title: What it is.
        frames: Number of frames in a request.
        requests: Number of requests that are measured together.
        evenly: Whether they are spread over the whole video, or follow one another.
    """

    title: str
    frames: int
    requests: int
    evenly: bool

    def indices(self, frames: int, random: np.random.Generator) -> Iterator[np.ndarray]:
        """The frames of each request, of a video of so many; windows start at random."""
        for _ in range(self.requests):
            if self.evenly:
                yield np.floor((np.arange(self.frames) + 0.5) * frames / self.frames).astype(int)
            else:
                yield random.integers(frames - self.frames + 1) + np.arange(self.frames)


ACCESSES = (
    Access(title="768 of the whole video", frames=768, requests=1, evenly=True),
    Access(title="256 that follow one another", frames=256, requests=4, evenly=False),
)


class _Took(NamedTuple):
    """Seconds of the clock, and seconds for which the process computed, in all its threads."""

    seconds: float
    computed: float


def measure(seconds: int, rounds: int) -> Tables:
    """The tables of the command ``decoding``."""
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
    """What a video is like, and on how many processors it is decoded."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.skip_frame = "NONREF"
        leaned_on = sum(1 for _ in container.decode(stream))
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
    """Each decoder, paired with ours in every round; see `difference` for the last columns."""
    random = np.random.default_rng(0)
    took: dict[str, list[_Took]] = {name: [] for name in decoders}
    order = list(decoders)
    differences = _differences(decoders, request, access, seconds)
    for _ in range(rounds):
        asked = [
            replace(request, indices=indices)
            for indices in access.indices(seconds * request.fps, random)
        ]
        for name in order:
            start, computed = time.perf_counter(), time.process_time()
            for one in asked:
                decoders[name](one)
            took[name].append(_Took(time.perf_counter() - start, time.process_time() - computed))
        order = [*order[1:], order[0]]  # so that a load from outside favours none
    number = access.frames * access.requests
    return [_row(name, took[name], took[OURS], number, differences[name]) for name in decoders]


def _differences(
    decoders: Mapping[str, Decoder], request: Request, access: Access, seconds: int
) -> dict[str, float]:
    """How far the frames of each decoder are from ours; it also warms everything up."""
    indices = next(access.indices(seconds * request.fps, np.random.default_rng(1)))
    asked = replace(request, indices=indices)
    ours = decoders[OURS](asked)
    return {name: difference(ours, decoder(asked)) for name, decoder in decoders.items()}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean difference of frames, in grey levels.

    Raises:
        ValueError: One is nearer to another frame of the same request than to its counterpart, or
            the shapes differ: then the two do not do the same work.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"Frames of shapes {ours.shape} and {theirs.shape} cannot be compared.")
    some = np.linspace(1, len(ours) - 1, 32).astype(int)
    reference = ours[some].astype(np.int16)
    same = np.abs(reference - theirs[some]).mean(axis=(1, 2, 3))
    before = np.abs(reference - theirs[some - 1]).mean(axis=(1, 2, 3))
    if not (same < before).all():
        raise ValueError("Decoders give different frames, so that their speeds say nothing.")
    return float(same.mean())


def _row(
    name: str, took: Sequence[_Took], ours: Sequence[_Took], frames: int, difference: float
) -> Row:
    pairs = list(zip(took, ours, strict=True))
    ratios = [a.seconds / b.seconds for a, b in pairs]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "decoder": name,
        "frames/s": frames / median(one.seconds for one in took),
        "times as long as re2tal": median(ratios),
        "lower quartile": low,
        "upper quartile": high,
        "computes times as long": median(a.computed / b.computed for a, b in pairs),
        "difference": difference,
        "rounds": len(ratios),
        "all seconds": [one.seconds for one in took],
    }
