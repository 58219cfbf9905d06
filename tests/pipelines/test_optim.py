"""Learning rates, decay and schedule apply to the right parameters at the right time."""

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from pipelines.config.recipe import OptimConfig
from pipelines.training.optimizer import (
    backbone_groups,
    build_average,
    build_optimizer,
    build_schedule,
    fast_forward,
)
from re2tal.backbones.slowfast import slowfast_toy
from re2tal.backbones.swin import swin_toy

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


def test_layers_learn_the_slower_the_earlier_they_are() -> None:
    backbone = swin_toy().build()
    config = replace(CONFIG, layer_decay=0.5)
    rates = {
        id(p): group["lr"] for group in backbone_groups(backbone, config) for p in group["params"]
    }
    by_name = {name: rates[id(p)] for name, p in backbone.named_parameters()}
    # four blocks in two stages; what merges patches goes with the block behind it
    for prefix, rate in (
        ("norm.", 1e-4),
        ("features.2.1.", 1e-4),
        ("features.2.0.", 5e-5),
        ("features.1.", 5e-5),
        ("features.0.1.", 2.5e-5),
        ("features.0.0.", 1.25e-5),
        ("patch_embed.", 6.25e-6),
    ):
        found = {rate for name, rate in by_name.items() if name.startswith(prefix)}
        assert found == {rate}, prefix
    assert len(by_name) == len(rates)


def test_both_pathways_of_a_slowfast_count_their_blocks_together() -> None:
    config = slowfast_toy()
    backbone: Any = config.build()
    layers = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    assert {layer for name, layer in layers.items() if ".conv1" in name.split("layer")[0]} == {0}
    assert set(layers.values()) == set(range(sum(config.depths) + 1))
    for name, layer in layers.items():
        if name.startswith("slow_path.layer") and "_lateral" not in name:
            other = name.replace("slow_path", "fast_path")
            assert layers.get(other, layer) == layer
    assert layers["slow_path.layer1_lateral.conv.weight"] == config.depths[0]


def test_a_schedule_is_taken_up_where_another_layout_left_it() -> None:
    optimizer = build_optimizer(TwoParts(), CONFIG)  # type: ignore[arg-type]
    before = build_schedule(optimizer, CONFIG, steps_per_epoch=10, epochs=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(30):
            before.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    # twice as many workers: half as many steps an epoch
    fast_forward(optimizer, CONFIG, steps_per_epoch=5, epochs=5, done=15)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        assert group["lr"] == pytest.approx(rate, rel=1e-6)
