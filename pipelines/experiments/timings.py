"""Times of training steps, paired: the work of the experiment `speed`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.experiments.device import device
from pipelines.experiments.benchmarking import name_of
from re2tal.memory import MemoryMeter, measure_activations
from pipelines.experiments.stacks import swin_stack
from pipelines.experiments.timing import paired
from pipelines.experiments.variants import VARIANTS, prepared
from pipelines.experiments.models import Workload

# A stage that a GPU is busy with.
_ON_GPU: dict[str, Any] = {"width": 192, "heads": 6, "grid": (64, 28, 28)}


def steps(
    *, on_cpu: Sequence[Mapping[str, Any]], on_gpu: Sequence[Mapping[str, Any]], rounds: int
) -> dict[str, Any]:
    """Times of a step of whole models.

    Args:
        on_cpu: fields of `Workload`s, if there is no GPU.
        on_gpu: likewise, if there is one.
        rounds: how often each way takes its turn.

    Returns:
        The device, and in "times" the seconds of every round, by step and way.
    """
    here = device()
    workloads = [Workload(**one) for one in (on_gpu if here.type == "cuda" else on_cpu)]
    times = {}
    for work in workloads:
        model = work.build().to(here)
        times[str(work)] = paired(model, work, work.video(here), VARIANTS, rounds=rounds)
    return _told(here) | {"times": times}


def against_depth(*, depths: Sequence[int], grid: Sequence[int], rounds: int) -> dict[str, Any]:
    """Times and peaks of a step of stacks of Swin blocks.

    Args:
        depths: numbers of residual branches.
        grid: tokens in time, height and width, if there is no GPU.
        rounds: how often each way takes its turn.

    Returns:
        The device, the shape of the stack, and for each of the depths in "times" the seconds of
        every round and in "peaks" the bytes, both by way, and in "parameters" their bytes.
    """
    here = device()
    on_cpu = {"width": 64, "heads": 2, "grid": tuple(grid)}
    stage = _ON_GPU if here.type == "cuda" else on_cpu
    times, peaks, parameters = [], [], []
    for depth in depths:
        stack, x = swin_stack(depth, **stage)
        stack, x = stack.to(here), x.to(here)
        times.append(paired(stack, _Sum(), x, VARIANTS, rounds=rounds))
        peaks.append({name: _peak(stack, x, name) for name in VARIANTS})
        parameters.append(sum(p.nbytes for p in stack.parameters()))
    found = {"stage": stage, "times": times, "peaks": peaks, "parameters": parameters}
    return _told(here) | found


class _Sum:
    """A step of a stack."""

    def step(self, model: nn.Module, video: Tensor) -> None:
        with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
            output = model(video)
        output.float().sum().backward()


def _peak(stack: nn.Module, x: Tensor, way: str) -> int:
    """Bytes of tensors at the peak of a step, parameters and gradients included."""
    with prepared(stack, VARIANTS[way]):
        if not x.is_cuda:
            return measure_activations(stack, x).peak
        stack.zero_grad(set_to_none=True)
        with MemoryMeter(x.device) as meter:
            _Sum().step(stack, x)
    assert meter.cuda_peak is not None
    return meter.cuda_peak


def _told(here: torch.device) -> dict[str, Any]:
    threads = "" if here.type == "cuda" else f", {torch.get_num_threads()} threads"
    return {"device": f"{name_of(here)}{threads}"}
