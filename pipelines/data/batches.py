"""Windows of an epoch, and their decoded batches.

Seed and epoch alone determine the windows of an epoch, and the rank determines a worker's share:
every worker takes the same number of steps, and a restarted run sees the same windows. Ray Data
only decodes: in parallel, in order, just ahead of training.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipelines.data.decoding import decode_sample
from re2tal.annotations import VideoAnnotation
from re2tal.localizers.protocol import Targets
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.windows import Window, WindowConfig, training_windows

if TYPE_CHECKING:  # importing it needs Ray; the training loop runs without Ray
    from pipelines.data.streaming import FrameStream


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """Usable video: its annotation, and the path or URI of its file."""

    annotation: VideoAnnotation
    uri: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Windows of one step of one worker.

    Attributes:
        frames: uint8 (B, T, H, W, 3); or precomputed features instead, float32 (B, T', C).
        mask: bool (B, T), false on padding and on every frame of a window that was not decoded.
        targets: segments and labels of each window, in feature-grid units.
        failures: video id to reason, for windows that could not be decoded.
    """

    windows: tuple[Window, ...]
    frames: Tensor
    mask: Tensor
    targets: tuple[Targets, ...]
    failures: dict[str, str]


def epoch_windows(
    videos: Sequence[Video],
    classes: Sequence[str],
    config: WindowConfig,
    *,
    stride: int,
    seed: int,
    epoch: int,
    augmentation: AugmentationConfig | None = None,
) -> list[Window]:
    """Cut the training videos into an epoch's windows, for all workers together, and shuffle them.

    Labels are indices into `classes`; `stride` is the backbone's number of frames per feature.
    Every epoch (counted from 0) has its own windows and order. `augmentation` may change the tempo
    of windows, but neither their number nor their order.
    """
    random, changes = generators(seed, epoch)
    augmentation = augmentation or AugmentationConfig()
    windows = [
        augmentation.tempo(changes).of_window(window, video.annotation, classes, config)
        for video in videos
        for window in training_windows(
            video.annotation, classes, config, stride=stride, random=random
        )
    ]
    return [windows[i] for i in random.permutation(len(windows))]


def generators(seed: int, epoch: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Return an epoch's generators: for the places and order of windows, and for their tempo."""
    # separate streams: with or without augmentation, places and order are the same
    return np.random.default_rng((seed, epoch)), np.random.default_rng((seed, epoch, 1))


def share(
    windows: Sequence[Window], *, rank: int, world_size: int, batch_size: int
) -> list[Window]:
    """Return one worker's windows: whole batches, and the same number of them for every worker.

    Raises:
        ValueError: if there are too few windows for one step.
    """
    # the rest is dropped: a worker with one step more would wait for the others' gradients for ever
    steps = len(windows) // (batch_size * world_size)
    if steps == 0:
        raise ValueError(
            f"{len(windows)} training windows do not fill one step of {world_size} workers x "
            f"batch {batch_size}: lower --batch-size or --scale.workers, or add videos."
        )
    return list(windows[rank : steps * batch_size * world_size : world_size])


def assemble(windows: Sequence[Window], samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Put windows and what `decode_sample` returned for each (`frames`, `error`) into a batch."""
    masks, targets, failures = [], [], {}
    for window, sample in zip(windows, samples, strict=True):
        error = str(sample["error"])
        if error:
            failures[window.video_id] = error
        mask = torch.from_numpy(window.mask())
        masks.append(torch.zeros_like(mask) if error else mask)
        # the frames of a failed window are black: no ground truth may rest on them
        keep = slice(0, 0) if error else slice(None)
        targets.append(
            Targets(
                segments=torch.from_numpy(np.array(window.segments[keep], np.float32)),
                labels=torch.from_numpy(np.array(window.labels[keep], np.int64)),
            )
        )
    return Batch(
        windows=tuple(windows),
        frames=torch.from_numpy(np.stack([sample["frames"] for sample in samples])),
        mask=torch.stack(masks),
        targets=tuple(targets),
        failures=failures,
    )


def stream_batches(
    stream: "FrameStream",
    windows: Sequence[Window],
    uris: dict[str, str],
    *,
    size: int,
    batch_size: int,
    name: str = "windows",
) -> Iterator[Batch]:
    """Decode a worker's windows with Ray Data, in parallel and in order, and yield them in batches.

    Frames have `size` pixels a side; the last batch may be smaller than `batch_size`. `name` is
    the execution's name on Ray's dashboard.
    """
    if not windows:
        return
    rows = [{"index": i, "uri": uris[w.video_id], "window": w} for i, w in enumerate(windows)]
    for samples in stream.batches(rows, size=size, batch_size=batch_size, name=name):
        yield assemble([windows[sample["index"]] for sample in samples], samples)


def decode_batches(
    windows: Sequence[Window], uris: dict[str, str], *, size: int, batch_size: int
) -> Iterator[Batch]:
    """Decode windows as `stream_batches` does, in this process and without Ray."""
    for start in range(0, len(windows), batch_size):
        chunk = windows[start : start + batch_size]
        samples = [
            decode_sample({"index": 0, "uri": uris[w.video_id], "window": w}, size=size)
            for w in chunk
        ]
        yield assemble(chunk, samples)


class Clock:
    """Stopwatch of a worker: elapsed time, time spent waiting for data, and number of frames."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._frames = 0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches of an epoch, and add up the time spent waiting for them."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - before
            if batch is None:
                return
            self._frames += batch.mask.numel()
            yield batch

    @property
    def elapsed(self) -> float:
        """Seconds since the epoch began."""
        return time.perf_counter() - self._start

    def metrics(self, world_size: int) -> dict[str, float]:
        """Return speed and share of waiting as MLflow metrics, as if all workers were as fast."""
        return {
            "train/frames_per_second": world_size * self._frames / self.elapsed,
            "train/data_wait_share": self._waited / self.elapsed,
        }
