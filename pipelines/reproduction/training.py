"""Trainings that an experiment compares, each in one process, by the loop that `train.py` has."""

import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from pipelines.local import LocalRuntime
from pipelines.loop import Trainer
from pipelines.reproduction.device import device
from pipelines.task import Task


def train_here(
    task: Task, weights: str | None, *, head: dict[str, torch.Tensor] | None = None
) -> tuple[dict[str, float], float]:
    """Trains to the recipe's last epoch in this process, on a GPU if there is one.

    Args:
        task: what is trained.
        weights: of the backbone, or None.
        head: weights of what follows the backbone, to begin with; at random if None.

    Returns:
        The metrics of the last epoch, and the seconds that it all took.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runtime = LocalRuntime(task.recipe, task.plan, Path(folder), device=device())
        trainer = Trainer(task, runtime, weights=weights, output=folder)
        if head is not None:
            for model in (trainer.state.detector, trainer.state.average.module):
                _localizer(model).load_state_dict(head)
        metrics = trainer.run()
    return metrics, time.perf_counter() - began


def _localizer(detector: nn.Module) -> nn.Module:
    return detector.get_submodule("localizer")
