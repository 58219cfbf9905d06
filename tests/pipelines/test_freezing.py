"""Frozen parts keep their values and run in evaluation mode."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.config.clip_recipes import RECIPES as CLIP_RECIPES
from pipelines.config.recipe import ModelConfig, Recipe
from pipelines.training.model import build_detector, freeze, train_mode
from pipelines.training.optimizer import build_optimizer
from re2tal.backbones.adapters import AdapterConfig
from re2tal.backbones.lora import LoraConfig
from re2tal.backbones.slowfast import slowfast_toy
from re2tal.backbones.videomae import videomae_toy
from re2tal.detector import Detector


def _detector(recipe: Recipe, config: ModelConfig) -> Detector[Any, Any]:
    return build_detector(replace(recipe, model=config), ("a", "b"), None)


def test_frozen_parts_have_no_gradients_and_stay_in_evaluation_mode(tiny_recipe: Recipe) -> None:
    config = replace(tiny_recipe.model, frozen=("backbone.patch_embed", "backbone.features.0"))
    detector = _detector(tiny_recipe, config)
    train_mode(detector, config)
    for name, parameter in detector.named_parameters():
        frozen = name.startswith(("backbone.patch_embed.", "backbone.features.0."))
        assert parameter.requires_grad is not frozen, name
    modes = {name: module.training for name, module in detector.named_modules()}
    assert not modes["backbone.patch_embed"]
    assert not any(on for name, on in modes.items() if name.startswith("backbone.features.0."))
    assert modes["backbone.features.2"]
    assert modes["localizer"]


def test_a_part_that_is_not_there_is_told_with_those_that_are(tiny_recipe: Recipe) -> None:
    config = replace(tiny_recipe.model, frozen=("backbone.stem",))
    with pytest.raises(ValueError, match=r"no part 'backbone.stem'.*backbone.patch_embed"):
        _detector(tiny_recipe, config)


@pytest.mark.parametrize("norms", ["trained", "statistics", "frozen"])
def test_norms_are_trained_or_keep_their_statistics_or_all(tiny_recipe: Recipe, norms: str) -> None:
    backbone = replace(slowfast_toy(), frozen_statistics=False)
    config = replace(tiny_recipe.model, backbone=backbone, norms=norms)  # type: ignore[arg-type]
    detector = _detector(tiny_recipe, config)
    train_mode(detector, config)
    found = [m for m in detector.backbone.modules() if isinstance(m, nn.BatchNorm3d)]
    assert found
    assert all(module.training is (norms == "trained") for module in found)
    assert all(p.requires_grad is (norms != "frozen") for m in found for p in m.parameters())
    convolutions = [m for m in detector.backbone.modules() if isinstance(m, nn.Conv3d)]
    assert all(p.requires_grad for m in convolutions for p in m.parameters())


def test_freezing_touches_the_localizer_only_by_name(tiny_recipe: Recipe) -> None:
    config = replace(tiny_recipe.model, norms="frozen")
    detector = _detector(tiny_recipe, config)
    assert all(p.requires_grad for p in detector.localizer.parameters())
    freeze(detector, replace(config, frozen=("localizer.class_head",)))
    assert not any(p.requires_grad for p in detector.localizer.class_head.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("tuning", "own"), [("adapters", ".adapter"), ("lora", ".lora_")])
def test_what_is_added_learns_beside_a_backbone_that_does_not(
    tiny_recipe: Recipe, tuning: Any, own: str
) -> None:
    backbone = replace(videomae_toy(), channels=32, depths=(2,), dropout=0.1)
    lora = replace(LoraConfig(), dropout=0.1) if tuning == "lora" else LoraConfig()
    config = replace(tiny_recipe.model, backbone=backbone, tuning=tuning, lora=lora)
    detector = _detector(tiny_recipe, config)
    train_mode(detector, config)
    for name, parameter in detector.named_parameters():
        assert parameter.requires_grad is (name.startswith("localizer.") or own in name), name
    for name, module in detector.named_modules():
        if name and not name.startswith("localizer"):
            assert module.training is (own in name), name
    optim = replace(tiny_recipe.optim, adapter_lr=4e-4, layer_decay=0.5)
    groups = build_optimizer(detector, optim).param_groups
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["adapters_decayed"] == 2 * rates["adapters_layer_1_decayed"] == 4e-4
    assert not any(name.startswith("backbone") for name in rates)
    wanted = 2 if tuning == "adapters" else 0
    convolutions = [m for m in detector.backbone.modules() if isinstance(m, nn.Conv1d)]
    assert len(convolutions) == wanted


@pytest.mark.parametrize("reversible", [False, True])
def test_a_frozen_backbone_keeps_no_activations(tiny_recipe: Recipe, reversible: bool) -> None:
    model = replace(tiny_recipe.model, tuning="frozen", reversible=reversible)
    detector = _detector(tiny_recipe, model)
    train_mode(detector, model)
    assert not detector.backbone.training
    sizes: list[int] = []
    frames = torch.zeros(1, 64, 32, 32, 3, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda t: t):
        features = detector.backbone(detector.normalized(frames))
    assert not sizes
    assert not features.requires_grad


_FROZEN, _ADAPTERS = {"tuning": "frozen"}, {"tuning": "adapters"}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (_FROZEN | {"frozen": ("backbone.patch_embed",)}, "--model.frozen backbone.patch_embed is"),
        (_ADAPTERS | {"frozen": ("backbone",)}, "but --model.tuning adapters freezes all of it"),
        (_FROZEN | {"norms": "frozen"}, "--model.norms frozen is for a trained backbone"),
        (_FROZEN | {"coupling_epochs": 1.0}, "--model.coupling-epochs moves .*tuning frozen does"),
        (_ADAPTERS | {"lora": LoraConfig(rank=2)}, "--model.lora goes with --model.tuning lora"),
        ({"adapters": AdapterConfig(ratio=2)}, "--model.adapters goes with --model.tuning adap"),
    ],
)
def test_options_that_contradict_one_another_are_refused(
    tiny_recipe: Recipe, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(tiny_recipe.model, **settings)


def test_a_run_without_a_backbone_has_nothing_to_add_to(tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, data=replace(tiny_recipe.data, features="features"))
    with pytest.raises(ValueError, match="tuning lora trains parts of a backbone, but --data"):
        replace(recipe, model=replace(recipe.model, tuning="lora"))


def test_a_backbone_that_is_the_result_has_nothing_added() -> None:
    recipe = CLIP_RECIPES["toy"]()
    assert replace(recipe, model=replace(recipe.model, tuning="frozen")).model.kept == ("backbone",)
    with pytest.raises(ValueError, match=r"--model.tuning adapters is for train.py"):
        replace(recipe, model=replace(recipe.model, tuning="adapters"))
