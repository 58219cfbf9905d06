"""The peak of a real step on a GPU."""

import copy

import torch

from pipelines.training.workload import Workload
from re2tal.detector import Detector


def measured_peak(detector: Detector, work: Workload) -> int | None:
    """Bytes that the CUDA allocator has handed out at most, over a forward and a backward.

    Parameters, gradients and inputs are included, as in a prediction; what else this process has on
    the GPU is not.

    Args:
        detector: a copy of it runs, in its own training mode.
        work: what the step is given.

    Returns:
        None if the GPU has too little memory.
    """
    before = torch.cuda.memory_allocated()
    try:
        model = copy.deepcopy(detector).to("cuda")
        inputs = work.inputs("cuda")
        torch.cuda.reset_peak_memory_stats()
        torch.stack([t.sum() for t in work.step(model, *inputs)]).sum().backward()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()
    return torch.cuda.max_memory_allocated() - before
