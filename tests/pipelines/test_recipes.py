"""What the recipes describe can be built, and is what was published."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipelines.model import ACTION, build_detector, reported_classes
from pipelines.recipes import RECIPES
from pipelines.train import parse
from re2tal.detection import Detections
from re2tal.localizers.vsgn import VSGNConfig

CLASSES = tuple(f"class {i}" for i in range(20))
FEATURES = {"thumos": 512, "anet": 192}  # of a window, in the authors' experiments


@pytest.mark.parametrize("name", RECIPES)
def test_its_parts_fit_together(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    with torch.device("meta"):
        backbone: Any = recipe.model.backbone.build()
    features = recipe.data.window.grid(100.0, stride=backbone.temporal_stride).num_features
    assert features == FEATURES.get(name.split("_")[0], 64)
    localizer: Any = recipe.model.localizer.build(backbone.channels, len(CLASSES)).eval()
    mask = torch.ones(1, features, dtype=torch.bool)
    with torch.inference_mode():  # any other number of features would be refused
        found = localizer(torch.zeros(1, backbone.channels, features), mask)
    assert isinstance(found[0], Detections)


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_can_be_given_on_the_command_line(name: str) -> None:
    recipe = parse([name, "--epochs", "3", "--data.window.stitch.clip", "0.3"])
    assert recipe == replace(
        RECIPES[name](),
        epochs=3,
        data=replace(
            recipe.data,
            window=replace(
                RECIPES[name]().data.window,
                stitch=replace(RECIPES[name]().data.window.stitch, clip=0.3),
            ),
        ),
    )
    localizer = recipe.model.localizer
    field, value = ("levels", 3) if isinstance(localizer, VSGNConfig) else ("head_layers", 2)
    option = f"--model.localizer.{field.replace('_', '-')}"
    changed = parse([name, option, str(value)]).model.localizer
    assert changed == replace(localizer, **{field: value})  # type: ignore[type-var]


def test_published_settings_of_activitynet_are_class_agnostic() -> None:
    for name, make in RECIPES.items():
        recipe = make()
        agnostic = name.startswith("anet")
        assert recipe.model.class_agnostic is agnostic
        assert reported_classes(recipe, CLASSES) == ((ACTION,) if agnostic else CLASSES)
        scored = replace(recipe, data=replace(recipe.data, video_scores="scores.json"))
        assert reported_classes(scored, CLASSES) == CLASSES


def test_a_class_agnostic_detector_has_one_class() -> None:
    recipe = RECIPES["toy_vsgn"]()
    agnostic = replace(recipe, model=replace(recipe.model, class_agnostic=True))
    assert build_detector(agnostic, CLASSES, weights=None).num_classes == 1
    assert build_detector(recipe, CLASSES, weights=None).num_classes == 20
