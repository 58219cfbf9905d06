"""What is profiled: a recipe's detector, or a backbone by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import lcm
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipelines.training.workload import Workload, workload_of
from re2tal.backbones.table import entry_of
from re2tal.detector import Detector

if TYPE_CHECKING:
    from pipelines.config.recipe import Recipe

# What Video Swins attend to at a time, and a multiple of what others want.
_UNIT = 16

# A recipe says nothing about classes; each costs a few hundred parameters and a row of logits.
_CLASSES = tuple(f"class {i}" for i in range(20))


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model whose training step is profiled.

    Attributes:
        name: what it is called.
        work: what its step is given.
        backbone: the shape of its backbone.
        unit: windows of the profile are multiples of so many frames.
        assemble: makes a detector with a backbone of a given shape, not rewired.
    """

    name: str
    work: Workload
    backbone: Any  # a `BackboneConfig` with `depths`
    unit: int
    assemble: Callable[[Any], Detector]

    @property
    def depth(self) -> int:
        """Blocks of the deepest stage."""
        return max(self.backbone.depths)

    def build(self, depth: int) -> Detector:
        """The detector in training mode, not rewired, with random weights.

        Args:
            depth: blocks of the deepest stage.
        """
        depths = list(self.backbone.depths)
        depths[depths.index(self.depth)] = depth
        return self.assemble(replace(self.backbone, depths=tuple(depths))).train()


class _Features(nn.Module):
    """In the place of a localizer: the features themselves."""

    num_classes = 0
    multiple = 1

    def predict(self, features: Tensor, mask: Tensor) -> tuple[Tensor]:  # noqa: ARG002
        return (features,)


def backbone_alone(name: str, work: Workload) -> Subject:
    """A backbone without a localizer, from uint8 frames to features.

    Args:
        name: a name of the table of backbones.
        work: what its step is given.

    Raises:
        UserError: there is none of that name.
        ValueError: it cannot be made deeper and shallower.
    """
    config: Any = entry_of(name).make()
    _check_depths(config)
    with torch.device("meta"):  # only a number is of interest
        multiple = config.build().multiple
    return Subject(
        name=name,
        work=work,
        backbone=config,
        unit=lcm(_UNIT, multiple),
        assemble=lambda shape: Detector(shape.build(), _Features()),
    )


def of_recipe(recipe: Recipe) -> Subject:
    """The detector of a recipe, reversible or not, with random weights and 20 classes.

    Args:
        recipe: the run's configuration.

    Raises:
        ValueError: If its backbone is none that can be made deeper and shallower.
    """
    # Here, because a backbone by itself is also profiled where there is no PyAV.
    from pipelines.training.model import build_detector

    def assemble(shape: Any) -> Detector:  # of the class that the recipe has
        model = replace(recipe.model, backbone=shape, reversible=False)
        return build_detector(replace(recipe, model=model), _CLASSES, weights=None)

    config: Any = recipe.model.backbone
    _check_depths(config)
    backbone = config.build()
    localizer = recipe.model.localizer.build(backbone.channels, len(_CLASSES))
    return Subject(
        name=recipe.name,
        work=workload_of(recipe),
        backbone=config,
        unit=lcm(_UNIT, backbone.multiple, backbone.temporal_stride * localizer.multiple),
        assemble=assemble,
    )


def _check_depths(config: Any) -> None:
    if not hasattr(config, "depths"):
        raise ValueError(
            f"A {type(config).__name__} cannot be profiled: its depth has to be changed for that, "
            "and it has no field `depths`."
        )
