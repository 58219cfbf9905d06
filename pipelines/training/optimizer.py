"""Optimizer, schedule and weight average of a training run, all of them PyTorch's own."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines.config.recipe import OptimConfig
from re2tal.detector import Detector


def parameter_groups(
    parameters: Iterable[nn.Parameter], *, lr: float, decay: float, name: str
) -> Iterator[dict[str, Any]]:
    """Splits parameters into those that are decayed and vectors, which are not.

    Args:
        parameters: of which frozen ones are left out.
        lr: learning rate.
        decay: weight decay of matrices and kernels.
        name: of the groups, before `_decayed` and `_free`.
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
    """The parameters of a backbone, whose layers learn the slower the earlier they are.

    Args:
        backbone: with `layer_of`, which is asked only if the rates differ.
        config: learning rate, its decay over the layers, weight decay.
    """
    layers: dict[int, list[nn.Parameter]] = {}
    for name, parameter in backbone.named_parameters():
        layer = backbone.layer_of(name) if config.layer_decay != 1 else 0
        layers.setdefault(layer, []).append(parameter)
    last = max(layers, default=0)
    for layer, parameters in sorted(layers.items(), reverse=True):
        yield from parameter_groups(
            parameters,
            lr=config.backbone_lr * config.layer_decay ** (last - layer),
            decay=config.weight_decay,
            name="backbone" if layer == last else f"backbone_layer_{layer}",
        )


def build_optimizer(detector: Detector[Any, Any], config: OptimConfig) -> Optimizer:
    """AdamW with a learning rate each for backbone and localizer; vectors are not decayed.

    Args:
        detector: the model; frozen parameters are left out.
        config: learning rates and decay.
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
    """Linear warm-up from a hundredth of the rate, then a cosine to zero; stepped every step.

    Args:
        optimizer: whose learning rates are scheduled.
        config: length of the warm-up, and of the cosine if it is not `epochs`.
        steps_per_epoch: optimizer steps an epoch.
        epochs: of the run.
    """
    total = (config.schedule_epochs or epochs) * steps_per_epoch
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
    """The schedule of a run that goes on with another number of steps an epoch.

    Args:
        optimizer: whose learning rates are set to where the schedule is.
        config: as for `build_schedule`.
        steps_per_epoch: from now on.
        epochs: of the run.
        done: steps that lie behind, as if all had been laid out like those to come.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.pop("initial_lr")
    schedule = build_schedule(optimizer, config, steps_per_epoch=steps_per_epoch, epochs=epochs)
    with warnings.catch_warnings():
        # PyTorch misses the optimizer's steps, which were taken before the interruption.
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step")
        for _ in range(done):
            schedule.step()
    return schedule


def build_average(detector: Detector[Any, Any], config: OptimConfig) -> AveragedModel:
    """Exponential moving average of the weights; buffers are copied.

    Args:
        detector: the model that is trained.
        config: the decay.
    """
    return AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
