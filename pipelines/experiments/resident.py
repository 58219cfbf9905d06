"""Memory of one training step: of fresh processes, and predicted."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import psutil
import torch
from torch import nn

from pipelines.experiments.benchmarking import Row, Tables
from re2tal.memory import MemoryMeter, StepMemory, predict_peak
from pipelines.experiments.variants import VARIANTS, prepared
from pipelines.experiments.models import LONG, SMALL, Workload

_MB, _GB = 1e6, 1e9

# glibc keeps freed blocks below a size that it raises as it goes; with a fixed one, whatever is
# larger returns to the system at once, and resident memory follows the tensors.
FOLLOWING = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def measure() -> Tables:
    """The tables of the command ``memory``."""
    deep = "swin3d_t with 12 blocks in stage 3"
    return {
        f"Increase of resident memory over a step: {SMALL}": resident(SMALL, VARIANTS),
        f"Predicted memory of a step: {LONG}": predicted(LONG, VARIANTS),
        f"Predicted memory of a step: {replace(LONG, model=deep)}": predicted(
            replace(LONG, model=deep), VARIANTS
        ),
    }


def resident(workload: Workload, variants: Iterable[str], repetitions: int = 3) -> list[Row]:
    """Resident memory that a step adds to a fresh process that has built the model.

    Args:
        workload: the step.
        variants: names of the ways to train.
        repetitions: processes for each number, of which the median is taken.
    """
    rows = []
    for name in variants:
        row: Row = {"training": name}
        for column, extra in (("MB", FOLLOWING), ("MB, allocator's default", {})):
            runs = [added_in_a_process(workload, name, extra) for _ in range(repetitions)]
            row[column] = median(runs) / _MB
        row["MB, predicted"] = added(predicted_step(workload, name)) / _MB
        rows.append(row)
    return rows


def predicted(workload: Workload, variants: Iterable[str]) -> list[Row]:
    """Predicted memory of a step, by what takes it."""
    rows = []
    for name in variants:
        memory = predicted_step(workload, name)
        rows.append(
            {
                "training": name,
                "peak, GB": memory.peak / _GB,
                "activations, GB": memory.activations / _GB,
                "parameters, GB": (memory.parameters + memory.buffers) / _GB,
                "gradients, GB": memory.gradients / _GB,
                "frames, GB": memory.inputs / _GB,
            }
        )
    return rows


def predicted_step(workload: Workload, variant: str) -> StepMemory:
    """What a step will use."""
    with prepared(workload.build(), VARIANTS[variant]) as model:
        return predict_peak(model, workload.video(), step=workload.forward)


def added(memory: StepMemory) -> int:
    """What comes on top of the model and the frames."""
    return memory.peak - memory.parameters - memory.buffers - memory.inputs


def added_in_a_process(
    workload: Workload, variant: str, environment: Mapping[str, str] = FOLLOWING
) -> int:
    """Bytes that a step adds to the resident memory of a fresh process that has built the model.

    Args:
        workload: the step.
        variant: name of the way to train.
        environment: variables for the process, such as settings of its allocator.
    """
    task = {
        "model": workload.model,
        "frames": workload.frames,
        "size": workload.size,
        "bfloat16": workload.bfloat16,
    }
    command = [sys.executable, "-m", __spec__.name, json.dumps(task), variant]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    variables = {**os.environ, **threads, **environment}
    done = subprocess.run(  # noqa: S603 - this module itself
        command, env=variables, stdout=subprocess.PIPE, check=True, text=True
    )
    return int(done.stdout)


def added_by_a_step(workload: Workload, variant: str) -> int:
    """Bytes by which the resident memory of this process grows at most over one step."""
    model, video = workload.build(), workload.video()
    _load_libraries()
    with prepared(model, VARIANTS[variant]), MemoryMeter() as meter:
        before = psutil.Process().memory_info().rss
        workload.step(model, video)
    return meter.rss_peak - before


def _load_libraries() -> None:
    """Have the code of matrix products and convolutions in memory."""
    linear, video = nn.Linear(8, 8), torch.randn(1, 3, 4, 8, 8)
    linear(torch.randn(2, 8)).sum().backward()
    nn.functional.conv3d(video, torch.randn(4, 3, 2, 4, 4), stride=(2, 4, 4))


def _child(arguments: Sequence[str]) -> None:
    task, variant = arguments
    sys.stdout.write(str(added_by_a_step(Workload(**json.loads(task)), variant)))


if __name__ == "__main__":
    _child(sys.argv[1:])
