"""What a run needs to go on from where it is, as a folder that is safe to load.

`detector/` is the averaged model, usable by itself; `training.pt` holds the rest. Everything loads
with `weights_only=True` or is safetensors. `complete.json` is written last and names each file with
its size: a folder without it, or with other files, is what an interrupted copy left behind.

No generator's state is kept: windows, augmentation and dropout are functions of the seed and of the
position in the run.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from re2tal.detector import Detector
from re2tal.trained import DetectorSpec, save_detector

DETECTOR_FOLDER = "detector"
COMPLETE_FILE = "complete.json"
_STATE_FILE = "training.pt"


class CheckpointError(Exception):
    """A checkpoint that is not whole or does not fit; the message says what is wrong."""


@dataclass(kw_only=True, slots=True)
class TrainingState:
    """Everything that changes while a run goes on.

    Attributes:
        detector: the trained model (not the DDP wrapper).
        average: its moving average.
        optimizer: with its moments.
        schedule: of the learning rates.
        scaler: of the loss, for float16.
        epoch: finished epochs.
        windows: of the epoch that goes on, how many all workers together are through with.
        step: finished steps.
        world_size: number of workers that took the steps.
        failures: video id to reason, of windows that could not be decoded.
    """

    detector: Detector
    average: AveragedModel
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: GradScaler
    epoch: int = 0
    windows: int = 0
    step: int = 0
    world_size: int = 1
    failures: dict[str, str] = field(default_factory=dict)

    def _parts(self) -> dict[str, Any]:
        return {
            "detector": self.detector,
            "average": self.average,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }

    def _position(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "windows": self.windows,
            "step": self.step,
            "world_size": self.world_size,
            "failures": self.failures,
        }

    def save(self, folder: Path, spec: DetectorSpec) -> None:
        """Writes a checkpoint; the folder appears only when it is whole.

        What else is put into it, before `complete`, belongs to it too.

        Args:
            folder: where to; replaced if it exists.
            spec: what the detector is built of.
        """
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        averaged = cast("Detector", self.average.module)
        save_detector(partial / DETECTOR_FOLDER, spec, averaged)
        state = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save({**state, **self._position()}, partial / _STATE_FILE)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)

    def load(self, folder: Path) -> None:
        """Reads a checkpoint into the model, optimizer and schedule that are there.

        Args:
            folder: written by `save` and `complete`.

        Raises:
            CheckpointError: if it is not whole.
        """
        if not is_complete(folder):
            raise CheckpointError(
                f"The checkpoint in {folder} is not whole: files are missing or cut short. Remove "
                "it, and the run goes on from the one before."
            )
        state = torch.load(folder / _STATE_FILE, map_location="cpu", weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for name in self._position():
            setattr(self, name, state[name])


def complete(folder: Path) -> None:
    """Says that a checkpoint is whole.

    Args:
        folder: with all of its files.
    """
    (folder / COMPLETE_FILE).write_text(json.dumps(_sizes(folder), indent=2))


def is_complete(folder: Path) -> bool:
    """Whether all files of a checkpoint are there, as long as they were written.

    Args:
        folder: what may be a checkpoint.
    """
    try:
        listed = json.loads((folder / COMPLETE_FILE).read_text())
    except (OSError, ValueError):
        return False
    sizes = _sizes(folder)
    return all(sizes.get(name) == size for name, size in listed.items())


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != COMPLETE_FILE
    }
