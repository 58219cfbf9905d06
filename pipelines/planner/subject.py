"""What is profiled: a recipe's detector, or a backbone by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import lcm
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pipelines.planner.step import Workload, workload_of
from re2tal.backbones.slowfast import SlowFastConfig, slowfast_50, slowfast_101
from re2tal.backbones.swin import SwinConfig, swin_b, swin_s, swin_t, swin_toy
from re2tal.detector import Detector

if TYPE_CHECKING:
    from pipelines.config.recipe import Recipe

# Backbones whose depth can be changed and whose windows are known.
Shape = SwinConfig | SlowFastConfig

BACKBONES: dict[str, Callable[[], Shape]] = {
    make.__name__: make for make in (swin_t, swin_s, swin_b, swin_toy, slowfast_50, slowfast_101)
}

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
    backbone: Shape
    unit: int
    assemble: Callable[[Shape], Detector]

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
        name: one of `BACKBONES`.
        work: what its step is given.
    """
    config = BACKBONES[name]()
    return Subject(
        name=name,
        work=work,
        backbone=config,
        unit=_unit(config),
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

    config = recipe.model.backbone
    if not isinstance(config, Shape):
        raise ValueError(  # noqa: TRY004 - it is a setting that is wrong
            f"A {type(config).__name__} cannot be profiled: its depth has to be changed for that. "
            "Profiled are recipes with a SwinConfig or a SlowFastConfig."
        )
    backbone = config.build()
    localizer = recipe.model.localizer.build(backbone.channels, len(_CLASSES))
    return Subject(
        name=recipe.name,
        work=workload_of(recipe),
        backbone=config,
        unit=lcm(_unit(config), backbone.temporal_stride * localizer.multiple),
        assemble=assemble,
    )


def _unit(config: Shape) -> int:
    """Frames that a backbone takes without padding."""
    if isinstance(config, SwinConfig):
        return config.patch[0] * config.window[0]
    return lcm(config.temporal_stride, config.alpha)
