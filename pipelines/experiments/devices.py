"""Experiment `devices`: memory and time of all ways to train on an accelerator."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn

from pipelines.experiments.experiment import Row, Tables, refuse_unknown
from pipelines.experiments.models import MODELS, build
from pipelines.experiments.timing import finish, ratios, timed
from pipelines.training.workload import Workload
from re2tal.memory import predict_peak
from re2tal.memory.ways import PLAIN, WAYS, prepared

OUT_OF_MEMORY = "out of memory"

_GB = 1e9

Run = tuple[float, int | None]
"""Seconds and peak bytes of a step; None on a CPU, which does not count bytes."""


def measure_devices(
    *,
    device: str = "cuda",
    models: Sequence[str] = ("swin3d_t", "slowfast_101"),
    frames: Sequence[int] = (64, 256, 768),
    size: int = 224,
    rounds: int = 5,
) -> Tables:
    """Peak memory and time of a step on an accelerator, for videos of several lengths.

    Peak memory is `torch.cuda.max_memory_allocated`, including the model, in bfloat16 autocast. It
    is listed beside the peak predicted for the same device's operators. Lengths that do not fit are
    listed too.

    Args:
        device: device of the training; only CUDA counts memory.
        models: networks of `pipelines/experiments/models.py`.
        frames: lengths of the video, tried in this order.
        size: height and width of a frame.
        rounds: number of rounds; each way to train takes one turn a round.
    """
    refuse_unknown("model", models, MODELS)
    work = Workload(frames=frames[0], size=size, precision="bfloat16")
    return {
        f"{model}, frames of {size}x{size}, {work.computing}": [
            row
            for length in frames
            for row in compare(model, replace(work, frames=length), torch.device(device), rounds)
        ]
        for model in models
    }


def compare(model: str, work: Workload, device: torch.device, rounds: int) -> list[Row]:
    """Train one model in all ways, in turns; a way that runs out of memory is not tried again."""
    network, inputs = build(model).to(device), work.noise(device)
    runs: dict[str, list[Run]] = {name: [] for name in WAYS}
    full: set[str] = set()
    for _ in range(rounds):
        for name in [name for name in WAYS if name not in full]:
            try:
                with prepared(network, WAYS[name].prepare):
                    runs[name].append(_run(network, work, inputs))
            except torch.OutOfMemoryError:
                full.add(name)
            # after the except clause: inside it, the error keeps the step's tensors alive
            network.zero_grad(set_to_none=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    plain = None if PLAIN in full else [seconds for seconds, _ in runs[PLAIN]]
    rows: list[Row] = []
    for name, way in WAYS.items():
        with prepared(network, way.prepare):
            predicted = predict_peak(network, *inputs, step=work.forward).peak
        row = {"frames": work.frames, "training": way.title, "predicted, GB": predicted / _GB}
        rows.append(row | (_FAILED if name in full else _row(runs[name], plain)))
    return rows


_FAILED: Row = {"peak, GB": OUT_OF_MEMORY, "seconds": "", f"of {PLAIN}": ""}


def _row(runs: Sequence[Run], plain: Sequence[float] | None) -> Row:
    seconds = [time for time, _ in runs]
    peaks = [peak for _, peak in runs if peak is not None]
    return {
        "peak, GB": max(peaks) / _GB if peaks else "not counted",
        "seconds": median(seconds),
        f"of {PLAIN}": median(ratios(seconds, plain)) if plain else "",
    }


def _run(network: nn.Module, work: Workload, inputs: tuple[Tensor, Tensor]) -> Run:
    """Measure a step, model and video included, after a warm-up step."""
    work.step(network, *inputs)
    network.zero_grad(set_to_none=True)
    device = inputs[0].device
    if device.type == "cuda":
        finish(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = timed(network, lambda: work.step(network, *inputs))
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
