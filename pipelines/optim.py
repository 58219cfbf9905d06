"""Optimizer, schedule and weight average of a training run, all of them PyTorch's own."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines.recipes import OptimConfig
from re2tal.detector import Detector


def _groups(module: nn.Module, *, lr: float, decay: float, name: str) -> Iterator[dict[str, Any]]:
    trained = [p for p in module.parameters() if p.requires_grad]
    for suffix, parameters, weight_decay in (
        ("decayed", [p for p in trained if p.ndim >= 2], decay),
        ("free", [p for p in trained if p.ndim < 2], 0.0),
    ):
        if parameters:
            yield {
                "params": parameters,
                "lr": lr,
                "weight_decay": weight_decay,
                "name": f"{name}_{suffix}",
            }


def build_optimizer(detector: Detector, config: OptimConfig) -> Optimizer:
    """AdamW with a learning rate each for backbone and localizer; vectors are not decayed.

    Args:
        detector: the model; frozen parameters are left out.
        config: learning rates and decay.
    """
    return AdamW(
        [
            *_groups(
                detector.backbone, lr=config.backbone_lr, decay=config.weight_decay, name="backbone"
            ),
            *_groups(
                detector.localizer,
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


def build_average(detector: Detector, config: OptimConfig) -> AveragedModel:
    """Exponential moving average of the weights; buffers are copied.

    Args:
        detector: the model that is trained.
        config: the decay.
    """
    return AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
