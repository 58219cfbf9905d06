"""Peak memory, predicted and measured, and time of a step, for videos of several lengths."""

import gc
from collections.abc import Iterable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from pipelines.experiments.benchmarking import Row, Tables
from re2tal.memory import predict_peak
from pipelines.experiments.timing import finish, timed
from pipelines.experiments.variants import REFERENCE, VARIANTS, prepared
from pipelines.experiments.models import Workload

OUT_OF_MEMORY = "out of memory"

_GB = 1e9


def measure(
    workloads: Iterable[Workload], frames: Sequence[int], device: torch.device, rounds: int
) -> Tables:
    """The tables of the command ``devices``.

    Args:
        workloads: what is trained.
        frames: lengths of the video, tried in this order.
        device: where; only CUDA counts memory.
        rounds: how often each way to train takes its turn.
    """
    return {
        f"{w.model}, frames of {w.size}x{w.size}, {w.precision}": [
            row for length in frames for row in compare(w.of(length), device, rounds)
        ]
        for w in workloads
    }


def compare(workload: Workload, device: torch.device, rounds: int) -> list[Row]:
    """All ways to train one model, in turns; one that ran out of memory is not tried again."""
    model, video = workload.build().to(device), workload.video(device)
    runs: dict[str, list[tuple[float, int | None]]] = {name: [] for name in VARIANTS}
    full: set[str] = set()
    for _ in range(rounds):
        for name in [name for name in VARIANTS if name not in full]:
            try:
                with prepared(model, VARIANTS[name]):
                    runs[name].append(_run(model, workload, video))
            except torch.OutOfMemoryError:
                full.add(name)
            # Behind the except clause, whose error holds the tensors of the step.
            _release(model, device)
    plain = None if REFERENCE in full else [seconds for seconds, _ in runs[REFERENCE]]
    return [
        {
            "frames": workload.frames,
            "training": name,
            "predicted, GB": _predicted(model, workload, video, name),
        }
        | (_FAILED if name in full else _row(runs[name], plain))
        for name in VARIANTS
    ]


def _predicted(model: nn.Module, workload: Workload, video: Tensor, name: str) -> float:
    """Of the same operators as on the device; model and video are included, as when measured."""
    with prepared(model, VARIANTS[name]):
        return predict_peak(model, video, step=workload.forward).peak / _GB


_FAILED: Row = {"peak, GB": OUT_OF_MEMORY, "seconds": "", f"of {REFERENCE}": ""}


def _row(runs: Sequence[tuple[float, int | None]], plain: Sequence[float] | None) -> Row:
    seconds = [time for time, _ in runs]
    peaks = [peak for _, peak in runs if peak is not None]
    ratio = median(a / b for a, b in zip(seconds, plain, strict=True)) if plain else ""
    return {
        "peak, GB": max(peaks) / _GB if peaks else "not counted",
        "seconds": median(seconds),
        f"of {REFERENCE}": ratio,
    }


def _run(model: nn.Module, workload: Workload, video: Tensor) -> tuple[float, int | None]:
    """Seconds and peak bytes of a step (model and video included), after one that is not timed."""
    workload.step(model, video)
    model.zero_grad(set_to_none=True)
    cuda = video.device.type == "cuda"
    if cuda:
        finish(video.device)
        torch.cuda.reset_peak_memory_stats(video.device)
    seconds = timed(model, workload, video)
    return seconds, torch.cuda.max_memory_allocated(video.device) if cuda else None


def _release(model: nn.Module, device: torch.device) -> None:
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
