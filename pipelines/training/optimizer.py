"""Optimizer, schedule and weight average of a training run, all of them PyTorch's own."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines.config.recipe import OptimConfig
from re2tal.backbones.adapters import additions
from re2tal.detector import Detector


def parameter_groups(
    parameters: Iterable[nn.Parameter], *, lr: float, decay: float, name: str
) -> Iterator[dict[str, Any]]:
    """Split parameters into those with weight decay and vectors, which have none.

    Args:
        parameters: parameters, of which frozen ones are left out.
        lr: learning rate.
        decay: weight decay of matrices and kernels.
        name: name of the groups, before `_decayed` and `_free`.
    """
    trained = [p for p in parameters if p.requires_grad]
    for suffix, chosen, weight_decay in (
        ("decayed", [p for p in trained if p.ndim >= 2], decay),
        ("free", [p for p in trained if p.ndim < 2], 0.0),
    ):
        if chosen:
            yield {
                "params": chosen,
                "lr": lr,
                "weight_decay": weight_decay,
                "name": f"{name}_{suffix}",
            }


def backbone_groups(backbone: Any, config: OptimConfig) -> Iterator[dict[str, Any]]:
    """Group the parameters of a backbone, with smaller learning rates for earlier layers.

    Args:
        backbone: network with `layer_of`, which is called only if the rates differ.
        config: learning rate, its decay over the layers, weight decay.
    """
    added = any(True for _ in additions(backbone))
    name, rate = ("adapters", config.adapter_lr) if added else ("backbone", config.backbone_lr)
    layers: dict[int, list[nn.Parameter]] = {}
    for parameter_name, parameter in backbone.named_parameters():
        layer = backbone.layer_of(parameter_name) if config.layer_decay != 1 else 0
        layers.setdefault(layer, []).append(parameter)
    last = max(layers, default=0)
    for layer, parameters in sorted(layers.items(), reverse=True):
        yield from parameter_groups(
            parameters,
            lr=rate * config.layer_decay ** (last - layer),
            decay=config.weight_decay,
            name=name if layer == last else f"{name}_layer_{layer}",
        )


def build_optimizer(detector: Detector[Any, Any], config: OptimConfig) -> Optimizer:
    """Build AdamW with one learning rate for the backbone and one for the localizer.

    Vectors have no weight decay; frozen parameters are left out.
    """
    return AdamW(
        [
            *backbone_groups(detector.backbone, config),
            *parameter_groups(
                detector.localizer.parameters(),
                lr=config.localizer_lr,
                decay=config.weight_decay,
                name="localizer",
            ),
        ]
    )


def build_schedule(
    optimizer: Optimizer, config: OptimConfig, *, steps_per_epoch: int, epochs: int
) -> LRScheduler:
    """Build a linear warm-up from a hundredth of the rate, then a cosine to zero.

    Args:
        optimizer: optimizer whose learning rates are scheduled.
        config: length of the warm-up, and of the cosine if it is not `epochs`.
        steps_per_epoch: number of optimizer steps per epoch; the schedule is stepped after each.
        epochs: number of epochs of the run.
    """
    total = (config.schedule_epochs or epochs) * steps_per_epoch
    # at least one step of warm-up, and in a run of several steps one of the cosine
    warmup = min(max(1, round(config.warmup_epochs * steps_per_epoch)), max(1, total - 1))
    return SequentialLR(
        optimizer,
        [
            LinearLR(optimizer, start_factor=0.01, total_iters=warmup),
            CosineAnnealingLR(optimizer, T_max=max(1, total - warmup)),
        ],
        milestones=[warmup],
    )


def fast_forward(
    optimizer: Optimizer, config: OptimConfig, *, steps_per_epoch: int, epochs: int, done: int
) -> LRScheduler:
    """Build the schedule of a run that goes on with another number of steps per epoch.

    Args:
        optimizer: optimizer whose learning rates are set to the schedule's position.
        config: see `build_schedule`.
        steps_per_epoch: number of steps per epoch from now on.
        epochs: number of epochs of the run.
        done: number of steps taken, as if all epochs had had `steps_per_epoch` steps.
    """
    # each schedule keeps the rate that it scales as `initial_lr`, and takes it from `lr` if absent
    for group in optimizer.param_groups:
        group["lr"] = group.pop("initial_lr")
    schedule = build_schedule(optimizer, config, steps_per_epoch=steps_per_epoch, epochs=epochs)
    with warnings.catch_warnings():
        # PyTorch warns that it saw no optimizer steps: they were taken before the interruption.
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step")
        for _ in range(done):
            schedule.step()
    return schedule


def build_average(detector: Detector[Any, Any], config: OptimConfig) -> AveragedModel:
    """Build an exponential moving average of the weights; buffers are copied."""
    return AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
