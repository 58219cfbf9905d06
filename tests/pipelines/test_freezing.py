"""What is not to be trained keeps its values, and is run as in evaluation."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.config.recipe import ModelConfig, Recipe
from pipelines.training.model import build_detector, freeze, train_mode
from re2tal.backbones.slowfast import slowfast_toy
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
