"""Checkpoints: the complete state of a run in a folder that is safe to load.

`detector/` is the averaged model, usable by itself; `training.pt` holds the rest. Everything loads
with `weights_only=True` or is safetensors. `complete.json` is written last, with the size and the
CRC-32 of each file and the metrics of the checkpoint: a folder without it, or with files that
differ from it, was left by an interrupted copy or is damaged.

No state of a random generator is kept: windows, augmentation and dropout are functions of the seed
and of the position in the run.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
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

from pipelines.core.storage import crc32, join, read_bytes, require_room, sizes_below
from re2tal.detector import Detector
from re2tal.errors import UserError
from re2tal.json_files import problem_of
from re2tal.localizers.losses import divide_alike, loss_parts
from re2tal.reversible import reversible_stages
from re2tal.trained import DetectorSpec, save_detector

_WHOLE = StateDictOptions(full_state_dict=True)


def shard(detector: Detector[Any, Any], *, device: torch.device, workers: int) -> None:
    """Shard a detector over all workers, in place (FSDP2).

    Each reversible stage is a unit, the rest is another. A stage that is a list of blocks has no
    forward of its own, so the backbone as a whole is its unit.

    Every worker calls this, with the same weights.
    """
    mesh = init_device_mesh(device.type, (workers,))
    stages = [stage for _, stage in reversible_stages(detector)]
    for stage in stages:  # inner units first: an outer one takes the parameters that are left
        if not isinstance(stage, nn.ModuleList):
            fully_shard(stage, mesh=mesh)
    if any(isinstance(stage, nn.ModuleList) for stage in stages):
        fully_shard(detector.backbone, mesh=mesh)
    fully_shard(detector, mesh=mesh)


def whole_state(module: nn.Module) -> dict[str, Any]:
    """Gather the state of a sharded module on every worker; every worker calls this."""
    return get_model_state_dict(module, options=_WHOLE)


def load_whole_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Load a whole state, which every worker has, into a sharded module."""
    set_model_state_dict(module, state, options=_WHOLE)


def whole_optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Gather the state of a sharded module's optimizer; every worker calls this and receives it."""
    return get_optimizer_state_dict(module, optimizer, options=_WHOLE)


def load_whole_optimizer_state(
    module: nn.Module, optimizer: Optimizer, state: dict[str, Any]
) -> None:
    """Load a whole state, which every worker has, into the optimizer of a sharded module."""
    set_optimizer_state_dict(module, optimizer, state, options=_WHOLE)


DETECTOR_FOLDER = "detector"
COMPLETE_FILE = "complete.json"
_STATE_FILE = "training.pt"
_POSITION = ("epoch", "windows", "step", "world_size", "failures")


@dataclass(kw_only=True, slots=True)
class TrainingState:
    """State of a run: everything that training changes.

    Attributes:
        detector: trained model, not its DDP wrapper.
        average: moving average of the detector's weights.
        whole: unsharded detector that receives the values of the average if detector and average
            are sharded; else None.
        optimizer: optimizer with its moments.
        schedule: schedule of the learning rates.
        scaler: scaler of the loss, for float16.
        epoch: number of finished epochs.
        windows: number of windows of the current epoch that all workers together have finished.
        step: number of finished steps.
        world_size: number of workers that took the steps.
        failures: reason by video id, where windows could not be decoded.
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
            found = cast("Detector[Any, Any]", self.average.module)
        else:
            found = self.whole
            found.load_state_dict(whole_state(self.average.module))
        # the average has counted no step, so its losses would be divided otherwise
        divide_alike(found, loss_parts(self.detector))
        return found

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
        """Write a checkpoint; every worker calls this, but only one writes.

        Further files that are in the folder when `complete` is called belong to the checkpoint too.

        Args:
            folder: folder of the checkpoint.
            spec: specification from which the detector can be built again.
            write: true on the one worker that writes.

        Raises:
            UserError: if there is no room for it.
        """
        averaged, parts = self.averaged(), self._parts()
        if not write:
            return
        around, wanted = str(folder.parent), _bytes([parts, averaged.state_dict()])
        require_room(around, wanted, what="a checkpoint")
        try:
            save_detector(folder / DETECTOR_FOLDER, spec, averaged)
            torch.save({**parts, **self._position()}, folder / _STATE_FILE)
        except (RuntimeError, SafetensorError):  # both libraries report a full disk without errno
            require_room(around, wanted, what="a checkpoint")
            raise

    def load(self, folder: Path) -> None:
        """Read a checkpoint into the existing model, optimizer and schedule.

        Args:
            folder: folder written by `save` and `complete`; `read_listing` verifies its content.

        Raises:
            DamagedCheckpointError: if files are missing or cut short.
            UserError: if the checkpoint is sharded and this run is not, or the other way round.
        """
        read_listing(folder)
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


class DamagedCheckpointError(UserError):
    """Checkpoint that differs from what was written; the message names it and the difference."""

    def __init__(self, folder: str | Path, reason: str) -> None:
        super().__init__(f"The checkpoint in {folder} is not whole: {reason}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFacts:
    """Size and digest of a file.

    Attributes:
        bytes: number of bytes.
        crc32: CRC-32 of the content in hexadecimal; None in checkpoints of earlier versions.
    """

    bytes: int
    crc32: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """Facts of the training that the evaluation of a waiting checkpoint needs.

    Attributes:
        steps: number of steps of an epoch.
        parts: `loss_parts` of the trained detector.
        threads: number of PyTorch's threads in a worker.
        failures: reason by video id, where windows of any worker could not be decoded.
    """

    steps: int
    parts: tuple[int, ...]
    threads: int
    failures: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Content of `complete.json`.

    Attributes:
        files: size and digest by path in the checkpoint.
        metrics: metrics of the run at the checkpoint's step.
        waiting: facts for its evaluation, as long as it waits for one.
    """

    files: dict[str, FileFacts]
    metrics: dict[str, float]
    waiting: Waiting | None = None


# Earlier versions listed sizes alone.
_LISTING: TypeAdapter[Listing | dict[str, int]] = TypeAdapter(Listing | dict[str, int])


def complete(folder: Path, metrics: Mapping[str, float], *, waiting: Waiting | None = None) -> None:
    """Mark a checkpoint as complete, once all of its files are in the folder."""
    listing = Listing(files=facts_below(folder), metrics=dict(metrics), waiting=waiting)
    (folder / COMPLETE_FILE).write_bytes(listing_bytes(listing))


def facts_below(folder: Path) -> dict[str, FileFacts]:
    """Return size and digest of all files below a folder, by relative path."""
    return {
        name: FileFacts(bytes=size, crc32=crc32(str(folder / name)))
        for name, size in sizes_below(str(folder)).items()
        if name != COMPLETE_FILE
    }


def listing_bytes(listing: Listing) -> bytes:
    """Return a listing as the content of `complete.json`."""
    return json.dumps(asdict(listing), indent=2, sort_keys=True).encode()


def read_listing(folder: str | Path, *, digests: bool = False) -> Listing:
    """Read `complete.json`, and compare the files of the checkpoint with it.

    Args:
        folder: path or URI of a checkpoint.
        digests: compare the CRC-32 too, which reads every file.

    Raises:
        DamagedCheckpointError: if the checkpoint differs from what was written.
    """
    place = str(folder)
    try:
        found = _LISTING.validate_json(read_bytes(join(place, COMPLETE_FILE)))
    except FileNotFoundError:
        raise DamagedCheckpointError(folder, f"{COMPLETE_FILE} is missing") from None
    except ValidationError as error:
        problem = problem_of(error.errors()[0])
        listed = f"{COMPLETE_FILE} does not list its files ({problem})"
        raise DamagedCheckpointError(folder, listed) from error
    if not isinstance(found, Listing):
        sizes = {name: FileFacts(bytes=size, crc32=None) for name, size in found.items()}
        found = Listing(files=sizes, metrics={})
    if _STATE_FILE not in found.files:
        raise DamagedCheckpointError(folder, f"{COMPLETE_FILE} does not list {_STATE_FILE}")
    there = sizes_below(place)
    for name, facts in found.files.items():
        if reason := _difference(place, name, facts, there.get(name), digest=digests):
            raise DamagedCheckpointError(folder, reason)
    return found


def _difference(folder: str, name: str, facts: FileFacts, size: int | None, *, digest: bool) -> str:
    """Describe how a file differs from the one that was written; empty if it does not."""
    if size is None:
        return f"{name} is missing"
    if size != facts.bytes:
        return f"{name} has {size} bytes instead of {facts.bytes}"
    if not digest or facts.crc32 is None:
        return ""
    try:
        same = crc32(join(folder, name)) == facts.crc32
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return "" if same else f"{name} does not have the CRC-32 that was recorded"


def _bytes(value: Any) -> int:
    """Count the bytes of all tensors in nested dictionaries and sequences."""
    if isinstance(value, Tensor):
        return value.nbytes
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(inner, Iterable) and not isinstance(inner, str):
        return sum(map(_bytes, inner))
    return 0
