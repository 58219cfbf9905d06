"""The decoders that are compared, called alike."""

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from re2tal.videos.decoding import decode


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Frames of a video of a constant frame rate, by their indices.

    Attributes:
        path: The file.
        fps: Frames per second.
        indices: Of the frames, rising, shape (T,).
        size: Width and height to which they are scaled; None keeps their size.
        threads: Decoding threads.
    """

    path: Path
    fps: int
    indices: np.ndarray
    size: tuple[int, int] | None
    threads: int


Decoder = Callable[[Request], np.ndarray]
"""Opens the file and gives the frames: RGB, uint8 of shape (T, H, W, 3)."""

OURS = "re2tal"


def available() -> tuple[dict[str, Decoder], list[dict[str, str]]]:
    """The decoders that can be imported, and a table of all of them with their versions."""
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

    modes = (
        "exact",
        "approximate",
    )
    return {f"torchcodec, {mode}": partial(read, seek_mode=mode) for mode in modes}


_PEERS: Mapping[str, Callable[[], dict[str, Decoder]]] = {
    "decord": _decord,
    "torchcodec": _torchcodec,
}
