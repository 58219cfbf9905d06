"""What a run needs to go on from the end of an epoch, as a folder that is safe to load.

`detector/` is the averaged model, usable by itself; `training.pt` holds the rest. Everything loads
with `weights_only=True` or is safetensors.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from re2tal.detector import Detector
from re2tal.trained import DetectorSpec, save_detector

DETECTOR_FOLDER = "detector"
_STATE_FILE = "training.pt"


@dataclass(kw_only=True, slots=True)
class TrainingState:
    """Everything that changes while a run goes on.

    Attributes:
        detector: the trained model (not the DDP wrapper).
        average: its moving average.
        optimizer: with its moments.
        schedule: of the learning rates.
        epoch: finished epochs.
        step: finished steps.
    """

    detector: Detector
    average: AveragedModel
    optimizer: Optimizer
    schedule: LRScheduler
    epoch: int = 0
    step: int = 0

    def _parts(self) -> dict[str, Any]:
        return {
            "detector": self.detector,
            "average": self.average,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }

    def save(self, folder: Path, spec: DetectorSpec) -> None:
        """Writes a checkpoint; the folder appears only when it is whole.

        Args:
            folder: where to; replaced if it exists.
            spec: what the detector is built of.
        """
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        averaged = cast("Detector", self.average.module)
        save_detector(partial / DETECTOR_FOLDER, spec, averaged)
        state = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save({**state, "epoch": self.epoch, "step": self.step}, partial / _STATE_FILE)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)

    def load(self, folder: Path) -> None:
        """Reads a checkpoint into the model, optimizer and schedule that are there.

        Args:
            folder: written by `save`.
        """
        state = torch.load(folder / _STATE_FILE, map_location="cpu", weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.epoch, self.step = state["epoch"], state["step"]
