"""Parameters, gradients and optimizer state split over the workers (FSDP2), for large backbones.

Zhao et al., "PyTorch FSDP", VLDB 2023. What is split is gathered again for a checkpoint and for the
evaluation, in which workers have different numbers of windows and could not gather together.
"""

from typing import Any

import torch
from torch import nn
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

from re2tal.reversible import reversible_stages

_WHOLE = StateDictOptions(full_state_dict=True)


def shard(detector: nn.Module, *, device: torch.device, workers: int) -> None:
    """Splits a detector in place: each reversible stage by itself, and the rest together.

    Args:
        detector: the same on all workers, which all call this.
        device: where it is.
        workers: their number.
    """
    mesh = init_device_mesh(device.type, (workers,))
    for _, stage in list(reversible_stages(detector)):
        fully_shard(stage, mesh=mesh)
    fully_shard(detector, mesh=mesh)


def whole_state(module: nn.Module) -> dict[str, Any]:
    """The state of a split module, gathered on every worker; all of them call this."""
    return get_model_state_dict(module, options=_WHOLE)


def load_whole_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Splits a state over the workers, each of which has all of it."""
    set_model_state_dict(module, state, options=_WHOLE)


def whole_optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state of a split module's optimizer, gathered on every worker; all of them call this."""
    return get_optimizer_state_dict(module, optimizer, options=_WHOLE)


def load_whole_optimizer_state(
    module: nn.Module, optimizer: Optimizer, state: dict[str, Any]
) -> None:
    """Splits an optimizer's state over the workers, each of which has all of it."""
    set_optimizer_state_dict(module, optimizer, state, options=_WHOLE)
