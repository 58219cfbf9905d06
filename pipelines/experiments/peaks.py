"""Peaks of training steps: the work of the experiment `memory`."""

from collections.abc import Sequence
from typing import Any

import torch

from pipelines.config.recipe import Precision
from re2tal.memory.fit import GIBIBYTE
from pipelines.experiments.planner import Planner
from pipelines.training.workload import Workload
from pipelines.experiments.subject import backbone_alone
from pipelines.experiments.resident import added, added_in_a_process, predicted_step
from pipelines.experiments.models import Workload as SmallStep

NO_GPU = "no GPU"
OUT_OF_MEMORY = "out of memory"

# What the benchmarks of `re2tal.reversible` call the planner's ways.
_VARIANTS = {"plain": "plain", "checkpointed": "checkpoint", "naive": "naive", "ours": "ours"}


def peaks(
    *,
    backbone: str,
    way: str,
    size: int,
    precision: Precision,
    frames: Sequence[int],
    depths: Sequence[int],
    cards: Sequence[float],
) -> dict[str, Any]:
    """Predicts peaks of a step in one way, and measures one if there is a GPU.

    Args:
        backbone: a name of the table of backbones.
        way: one of `WAYS`.
        size: height and width of a frame.
        precision: what the branches compute in.
        frames: of the clip; with the most of them, depths are compared and the GPU is measured.
        depths: blocks of the deepest stage.
        cards: memory in GiB that a clip is to fit.

    Returns:
        Bytes for each of `frames` and of `depths`; in "fits", frames for each of `cards`; in
        "measured", bytes or why there are none.
    """
    work = Workload(batch=1, frames=max(frames), size=size, precision=precision)
    planner = Planner(backbone_alone(backbone, work))
    return {
        "frames": [planner.peak(way, frames=count) for count in frames],
        "depths": [planner.peak(way, depth=depth) for depth in depths],
        "fits": [planner.frames_that_fit(way, int(card * GIBIBYTE)) for card in cards],
        "measured": _measured(planner, way),
    }


def _measured(planner: Planner, way: str) -> int | str:
    if not torch.cuda.is_available():
        return NO_GPU
    size = planner.measure(way)
    return OUT_OF_MEMORY if size is None else size


def resident(*, model: str, frames: int, size: int, way: str) -> dict[str, int]:
    """What a small step adds to the resident memory of a fresh process, on the CPU.

    Args:
        model: one of `pipelines.experiments.models.MODELS`.
        frames: of the clip.
        size: height and width of a frame.
        way: one of `WAYS`.

    Returns:
        Bytes, predicted and measured; parameters and frames are not among them.
    """
    step = SmallStep(model=model, frames=frames, size=size)
    variant = _VARIANTS[way]
    return {
        "predicted": added(predicted_step(step, variant)),
        "measured": added_in_a_process(step, variant),
    }
