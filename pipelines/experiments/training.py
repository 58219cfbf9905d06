"""Trainings that an experiment compares, each in one process, by the loop that `train.py` has."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pipelines.experiments.device import device
from pipelines.training.local import LocalRuntime
from pipelines.training.trainer import Task, Trainer
from re2tal.detector import Detector


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trained:
    """How a training ended.

    Attributes:
        metrics: of the last epoch.
        detector: the average over the last steps, which the metrics are of.
        seconds: that it all took.
    """

    metrics: dict[str, float]
    detector: Detector
    seconds: float


def train_here(
    task: Task, weights: str | None, *, head: dict[str, Tensor] | None = None
) -> Trained:
    """Trains to the recipe's last epoch in this process, on a GPU if there is one.

    Args:
        task: what is trained.
        weights: of the backbone, or None.
        head: weights of what follows the backbone, to begin with; at random if None.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runtime = LocalRuntime(task.recipe, task.plan, Path(folder), device=device())
        trainer = Trainer(task, runtime, weights=weights, output=folder)
        if head is not None:
            for model in (trainer.state.detector, trainer.state.average.module):
                _localizer(model).load_state_dict(head)
        metrics = trainer.run()
        detector = trainer.state.averaged()
    return Trained(metrics=metrics, detector=detector, seconds=time.perf_counter() - began)


def _localizer(detector: nn.Module) -> nn.Module:
    return detector.get_submodule("localizer")
