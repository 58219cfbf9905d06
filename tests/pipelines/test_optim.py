"""Learning rates, decay and schedule reach the right parameters at the right time."""

import math

import pytest
from torch import nn

from pipelines.optim import build_average, build_optimizer, build_schedule
from pipelines.recipes import OptimConfig

CONFIG = OptimConfig(
    backbone_lr=1e-4, localizer_lr=1e-2, weight_decay=0.1, warmup_epochs=1, ema=0.9
)


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.localizer = nn.Linear(4, 2)


def test_each_part_has_its_rate_and_vectors_are_not_decayed() -> None:
    groups = {g["name"]: g for g in build_optimizer(TwoParts(), CONFIG).param_groups}  # type: ignore[arg-type]
    assert {name: (g["lr"], g["weight_decay"], len(g["params"])) for name, g in groups.items()} == {
        "backbone_decayed": (1e-4, 0.1, 1),
        "backbone_free": (1e-4, 0.0, 3),
        "localizer_decayed": (1e-2, 0.1, 1),
        "localizer_free": (1e-2, 0.0, 1),
    }


def test_frozen_parameters_are_left_out() -> None:
    model = TwoParts()
    model.backbone.requires_grad_(requires_grad=False)
    names = [g["name"] for g in build_optimizer(model, CONFIG).param_groups]  # type: ignore[arg-type]
    assert names == ["localizer_decayed", "localizer_free"]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_the_rate_rises_then_follows_a_cosine_to_zero() -> None:
    optimizer = build_optimizer(TwoParts(), CONFIG)  # type: ignore[arg-type]
    schedule = build_schedule(optimizer, CONFIG, steps_per_epoch=10, epochs=5)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[-1]["lr"])
        schedule.step()
    for step in range(10):
        assert rates[step] == pytest.approx(1e-2 * (0.01 + 0.99 * step / 10))
    for step in range(10, 50):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 10) / 40))
        assert rates[step] == pytest.approx(1e-2 * cosine, abs=1e-9)


def test_the_average_moves_by_its_decay() -> None:
    model = TwoParts()
    average = build_average(model, CONFIG)  # type: ignore[arg-type]
    start = model.localizer.weight.detach().clone()
    average.update_parameters(model)
    model.localizer.weight.data.add_(1.0)
    average.update_parameters(model)
    moved = average.module.state_dict()["localizer.weight"] - start
    assert moved.numpy() == pytest.approx(0.1, abs=1e-6)
