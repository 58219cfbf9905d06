"""Checkpoints: the complete state of a run in a folder that is safe to load.

`detector/` is the averaged model, usable by itself; `training.pt` holds the rest. Everything loads
with `weights_only=True` or is safetensors. `complete.json` is written last and names each file with
its size: a folder without it, or with other files, was left behind by an interrupted copy.

No generator's state is kept: windows, augmentation and dropout are functions of the seed and of the
position in the run.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from pipelines.core.storage import join, read_bytes, sizes_below
from re2tal.detector import Detector
from re2tal.errors import UserError
from re2tal.reversible import reversible_stages
from re2tal.trained import DetectorSpec, save_detector

_WHOLE = StateDictOptions(full_state_dict=True)


def shard(detector: nn.Module, *, device: torch.device, workers: int) -> None:
    """Split a detector in place over all workers: one unit per reversible stage, one for the rest.

    Every worker calls this, with the same weights.
    """
    mesh = init_device_mesh(device.type, (workers,))
    for _, stage in list(reversible_stages(detector)):
        fully_shard(stage, mesh=mesh)
    fully_shard(detector, mesh=mesh)


def whole_state(module: nn.Module) -> dict[str, Any]:
    """Gather the state of a split module on every worker; all of them call this."""
    return get_model_state_dict(module, options=_WHOLE)


def load_whole_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Split a state over the workers, each of which has all of it."""
    set_model_state_dict(module, state, options=_WHOLE)


def whole_optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Gather the state of a split module's optimizer on every worker; all of them call this."""
    return get_optimizer_state_dict(module, optimizer, options=_WHOLE)


def load_whole_optimizer_state(
    module: nn.Module, optimizer: Optimizer, state: dict[str, Any]
) -> None:
    """Split an optimizer's state over the workers, each of which has all of it."""
    set_optimizer_state_dict(module, optimizer, state, options=_WHOLE)


DETECTOR_FOLDER = "detector"
COMPLETE_FILE = "complete.json"
_STATE_FILE = "training.pt"
_POSITION = ("epoch", "windows", "step", "world_size", "failures")


@dataclass(kw_only=True, slots=True)
class TrainingState:
    """Everything that changes while a run goes on.

    Attributes:
        detector: trained model, not its DDP wrapper.
        average: moving average of the detector's weights.
        whole: unsplit detector that receives the values of the average, where detector and average
            are split over workers; else None.
        optimizer: optimizer with its moments.
        schedule: schedule of the learning rates.
        scaler: scaler of the loss, for float16.
        epoch: number of finished epochs.
        windows: number of windows of the current epoch that all workers together have finished.
        step: number of finished steps.
        world_size: number of workers that took the steps.
        failures: reasons by video id, of windows that could not be decoded.
    """

    detector: Detector[Any, Any]
    average: AveragedModel
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: GradScaler
    whole: Detector[Any, Any] | None = None
    epoch: int = 0
    windows: int = 0
    step: int = 0
    world_size: int = 1
    failures: dict[str, str] = field(default_factory=dict)

    def averaged(self) -> Detector[Any, Any]:
        """Return the moving average as a detector of its own; every worker calls this."""
        if self.whole is None:
            return cast("Detector[Any, Any]", self.average.module)
        self.whole.load_state_dict(whole_state(self.average.module))
        return self.whole

    def _parts(self) -> dict[str, dict[str, Any]]:
        small = {"schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict()}
        if self.whole is None:
            return small | {
                "detector": self.detector.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        return small | {
            "detector": whole_state(self.detector),
            "average": whole_state(self.average),
            "optimizer": whole_optimizer_state(self.detector, self.optimizer),
        }

    def _position(self) -> dict[str, Any]:
        position = {name: getattr(self, name) for name in _POSITION}
        return {**position, "sharded": self.whole is not None}

    def save(self, folder: Path, spec: DetectorSpec, *, write: bool = True) -> None:
        """Write a checkpoint; every worker calls this, and one writes.

        Other files that are put into the folder before `complete` belong to the checkpoint too.

        Args:
            folder: folder of the checkpoint.
            spec: specification from which the detector can be built again.
            write: true on the one worker that writes.
        """
        averaged, parts = self.averaged(), self._parts()
        if write:
            save_detector(folder / DETECTOR_FOLDER, spec, averaged)
            torch.save({**parts, **self._position()}, folder / _STATE_FILE)

    def load(self, folder: Path) -> None:
        """Read a checkpoint into the existing model, optimizer and schedule.

        Args:
            folder: folder written by `save` and `complete`.

        Raises:
            UserError: if the checkpoint is not whole, or only one of it and this run is sharded.
        """
        if not is_complete(folder):
            raise UserError(
                f"The checkpoint in {folder} is not whole: files are missing or cut short. Remove "
                "it, and the run goes on from the one before."
            )
        state = torch.load(folder / _STATE_FILE, map_location="cpu", weights_only=True)
        if bool(state["sharded"]) is not (self.whole is not None):
            how = "with" if state["sharded"] else "without"
            raise UserError(
                f"The checkpoint in {folder} was written {how} --scale.sharded, which "
                "changes the optimizer's state: resume with the setting that the run began with."
            )
        if self.whole is None:
            self.detector.load_state_dict(state["detector"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            load_whole_state(self.detector, state["detector"])
            load_whole_state(self.average, state["average"])
            load_whole_optimizer_state(self.detector, self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        for name in _POSITION:
            setattr(self, name, state[name])


def complete(folder: Path) -> None:
    """Mark a checkpoint as whole, once all of its files are in the folder."""
    sizes = sizes_below(str(folder))
    sizes.pop(COMPLETE_FILE, None)
    (folder / COMPLETE_FILE).write_text(json.dumps(sizes, indent=2, sort_keys=True))


def is_complete(folder: str | Path) -> bool:
    """Tell whether all files of a checkpoint are there, as long as they were written.

    Args:
        folder: path or URI of a possible checkpoint.
    """
    try:
        listed = json.loads(read_bytes(join(str(folder), COMPLETE_FILE)))
    except (OSError, ValueError):
        return False
    sizes = sizes_below(str(folder))
    return all(sizes.get(name) == size for name, size in listed.items())
