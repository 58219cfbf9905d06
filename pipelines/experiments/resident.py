"""Memory that a small training step adds to a fresh process, and its prediction."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import psutil
import torch
from torch import nn

from pipelines.experiments.models import build
from pipelines.training.workload import Workload
from re2tal.memory import MemoryMeter, StepMemory, predict_peak
from re2tal.memory.ways import WAYS, prepared

# glibc keeps freed blocks below a threshold that it raises as it goes; with a fixed one, larger
# blocks return to the system at once, and resident memory follows the tensors.
FOLLOWING = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def resident(*, model: str, step: Mapping[str, Any], way: str, repetitions: int) -> dict[str, Any]:
    """Measure and predict the bytes that a step adds, beside parameters and frames, on the CPU.

    Args:
        model: key of `MODELS`.
        step: fields of a `Workload`.
        way: key of `WAYS`.
        repetitions: number of processes, of which the median is taken.

    Returns:
        Bytes: predicted, measured, and measured with the default settings of the allocator.
    """
    work = Workload(**step)

    def added(environment: Mapping[str, str]) -> float:
        runs = [added_in_a_process(model, work, way, environment) for _ in range(repetitions)]
        return median(runs)

    memory = predicted_step(model, work, way)
    return {
        "predicted": memory.peak - memory.parameters - memory.buffers - memory.inputs,
        "measured": added(FOLLOWING),
        "allocator's default": added({}),
    }


def predicted_step(model: str, work: Workload, way: str) -> StepMemory:
    """Predict the memory of a step of a model of `MODELS`."""
    with prepared(build(model), WAYS[way].prepare) as network:
        return predict_peak(network, *work.inputs(), step=work.forward)


def added_in_a_process(
    model: str, work: Workload, way: str, environment: Mapping[str, str] = FOLLOWING
) -> int:
    """Measure the bytes that a step adds to a fresh process that has built the model.

    Args:
        model: key of `MODELS`.
        work: input of the step.
        way: key of `WAYS`.
        environment: variables for the process, such as settings of its allocator.
    """
    command = [sys.executable, "-m", __spec__.name, model, json.dumps(asdict(work)), way]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    variables = {**os.environ, **threads, **environment}
    done = subprocess.run(  # noqa: S603 - this module itself
        command, env=variables, stdout=subprocess.PIPE, check=True, text=True
    )
    return int(done.stdout)


def _added_here(model: str, work: Workload, way: str) -> int:
    """Measure the bytes by which this process grows at most over one step."""
    network, inputs = build(model), work.noise()
    _load_libraries()
    with prepared(network, WAYS[way].prepare), MemoryMeter() as meter:
        before = psutil.Process().memory_info().rss
        work.step(network, *inputs)
    return meter.rss_peak - before


def _load_libraries() -> None:
    """Load the code of matrix products and convolutions into memory."""
    linear, video = nn.Linear(8, 8), torch.randn(1, 3, 4, 8, 8)
    linear(torch.randn(2, 8)).sum().backward()
    nn.functional.conv3d(video, torch.randn(4, 3, 2, 4, 4), stride=(2, 4, 4))


def _child(arguments: Sequence[str]) -> None:
    model, step, way = arguments
    sys.stdout.write(str(_added_here(model, Workload(**json.loads(step)), way)))


if __name__ == "__main__":
    _child(sys.argv[1:])
