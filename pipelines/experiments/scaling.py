"""Experiment `scaling`: training with several workers on one machine."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.config.recipes import toy
from pipelines.experiments.experiment import Tables
from pipelines.training.model import build_detector
from re2tal.datasets.toy import FPS, make_clip
from re2tal.localizers import Targets
from re2tal.videos.decoding import decode

CLASSES = ("bounce", "orbit", "shake", "spin", "zigzag")

Batch = tuple[Tensor, Tensor, list[Targets]]


def measure_scaling(
    *, workers: Sequence[int] = (1, 2, 4), rounds: int = 9, frames: int = 128, size: int = 64
) -> Tables:
    """Time of a step with more workers, and its share of gradient exchange.

    The toy recipe's detector, rewired, trains on frames in memory. Every round times, on all
    workers, a step with gradient exchange and then one without; the difference is the communication
    that backward does not hide. Then each worker decodes the frames of a step from a toy video,
    which shows the cost of data per core. Each worker has one thread.

    Args:
        workers: numbers of processes; all are compared with the first.
        rounds: number of rounds, each with a step with and one without exchange.
        frames: length of a worker's single window.
        size: side of the square frames in pixels.
    """
    rows = []
    for count in workers:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_worker, (count, rounds, frames, size, folder), nprocs=count)
            rows.append(torch.load(Path(folder) / "row.pt", weights_only=True))
    first = rows[0]["frames a second"] / rows[0]["workers"]
    for row in rows:
        row["of linear"] = row["frames a second"] / row["workers"] / first
    return {f"A step of the toy detector, {frames} frames of {size} pixels a worker": rows}


def _worker(rank: int, count: int, rounds: int, frames: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count
    )
    torch.manual_seed(0)
    recipe = toy()
    recipe = replace(recipe, model=replace(recipe.model, weights=None))
    detector = build_detector(recipe, CLASSES, None)
    model = DistributedDataParallel(detector)
    batch = _batch(frames, size)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    video = make_clip(CLASSES[0], frames / FPS, seed=0).content
    times = [
        (_step(model, batch), _alone(model, batch), _reduce(gradients), _decode(video, batch[0]))
        for _ in range(rounds + 1)
    ]
    exchanged, alone, reduced, decoded = zip(*times[1:], strict=True)  # the first round warms up
    if rank == 0:
        step, without = median(exchanged), median(alone)
        shares = [1 - b / a for a, b in zip(exchanged, alone, strict=True)]
        row: dict[str, Any] = {
            "workers": count,
            "step, s": step,
            "without exchange, s": without,
            "exchange not hidden": median(shares),
            "all-reduce alone, s": median(reduced),
            "decoding, s": median(decoded),
            "gradients, MB": gradients / 1e6,
            "frames a second": count * frames / step,
        }
        torch.save(row, Path(folder) / "row.pt")
    dist.destroy_process_group()


def _batch(frames: int, size: int) -> Batch:
    video = torch.randint(0, 256, (1, frames, size, size, 3), dtype=torch.uint8)
    targets = Targets(segments=torch.tensor([[5.0, 20.0]]), labels=torch.tensor([1]))
    return video, torch.ones(1, frames, dtype=torch.bool), [targets]


def _together() -> float:
    """Wait for all workers, and return the time at which they begin."""
    dist.barrier()
    return time.perf_counter()


def _step(model: nn.Module, batch: Batch) -> float:
    model.zero_grad(set_to_none=True)
    began = _together()
    losses: dict[str, Tensor] = model(*batch)
    torch.stack(list(losses.values())).sum().backward()
    dist.barrier()
    return time.perf_counter() - began


def _alone(model: DistributedDataParallel, batch: Batch) -> float:
    with model.no_sync():
        return _step(model, batch)


def _decode(video: bytes, like: Tensor) -> float:
    """Time the decoding of as many frames as the batch `like` has, in the same size."""
    _, frames, size, *_ = like.shape
    times = (np.arange(frames) + 0.5) / FPS
    began = _together()
    decode(video, times, size=size)
    return time.perf_counter() - began


def _reduce(size: int) -> float:
    """Time an all-reduce of `size` bytes alone."""
    content = torch.zeros(size // 4)
    began = _together()
    dist.all_reduce(content)
    return time.perf_counter() - began
