"""What a sweep changes in a recipe before it searches around it, and layers of its backbone."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from pipelines.config.recipe import Recipe


def one_worker(recipe: Recipe) -> Recipe:
    """The recipe with a worker a trial where there are no GPUs, so that two trials fit two cores.

    Args:
        recipe: that is searched around.
    """
    if recipe.scale.gpu:
        return recipe
    return replace(recipe, scale=replace(recipe.scale, workers=1, cpus_per_decoder=0.4))


def first_layers(recipe: Recipe, share: float) -> tuple[str, ...]:
    """Names of the modules that hold the first layers of a recipe's backbone, for `model.frozen`.

    Args:
        recipe: with a backbone.
        share: of its blocks; 0 is what comes before the first block.
    """
    return _first_layers(recipe.model.backbone, share)  # type: ignore[arg-type]


@cache
def _first_layers(config: Any, share: float) -> tuple[str, ...]:
    with torch.device("meta"):  # only the names are of interest
        backbone = config.build()
    layers = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    if not layers:  # features in its place
        return ()
    last = round(share * max(layers.values()))
    return tuple(f"backbone.{name}" for name in _within(backbone, "", layers, last))


def _within(module: nn.Module, prefix: str, layers: dict[str, int], last: int) -> Iterator[str]:
    """The largest modules all of whose parameters lie in the first layers."""
    for name, child in module.named_children():
        whole = f"{prefix}{name}"
        own = [layer for parameter, layer in layers.items() if parameter.startswith(f"{whole}.")]
        if own and max(own) <= last:
            yield whole
        elif own and min(own) <= last:
            yield from _within(child, f"{whole}.", layers, last)
