"""Compiled parts compute what they did, and are really compiled."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.config.recipe import CompiledPart, Recipe
from pipelines.planner.step import workload_of
from pipelines.training.model import build_detector, compile_parts
from re2tal.detector import Detector

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EVERYTHING: tuple[CompiledPart, ...] = ("branches", "localizer")


def _built(recipe: Recipe) -> Detector:
    torch.manual_seed(0)
    return build_detector(recipe, ("a", "b"), None).train()


def _gradients(detector: Detector, recipe: Recipe) -> list[Tensor]:
    torch.manual_seed(1)
    work = workload_of(recipe)
    torch.stack([t.square().mean() for t in work.step(detector, *work.inputs())]).sum().backward()
    return [p.grad for p in detector.parameters() if p.grad is not None]


@pytest.mark.parametrize("parts", [(), ("branches",), ("localizer",), EVERYTHING])
def test_gradients_are_the_same_and_names_stay(
    tiny_recipe: Recipe, parts: tuple[CompiledPart, ...]
) -> None:
    torch._dynamo.reset()
    compiled: list[torch.fx.GraphModule] = []

    def noting(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    detector, names = _built(tiny_recipe), set(_built(tiny_recipe).state_dict())
    compile_parts(detector, parts, backend=noting)
    found = _gradients(detector, tiny_recipe)
    assert bool(compiled) is bool(parts)
    assert set(detector.state_dict()) == names
    for a, b in zip(found, _gradients(_built(tiny_recipe), tiny_recipe), strict=True):
        torch.testing.assert_close(a, b)


def test_branches_of_a_plain_backbone_are_told_of(tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, model=replace(tiny_recipe.model, reversible=False))
    with pytest.raises(ValueError, match=r"--optim\.compile branches needs a rewired backbone"):
        compile_parts(_built(recipe), ("branches",))
