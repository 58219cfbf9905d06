"""Prediction of a step's memory, for a recipe's detector or for a backbone alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from math import lcm
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipelines.training.workload import SOME_CLASSES, Workload, workload_of
from re2tal.backbones.adapters import Addition, additions, refuse_unused
from re2tal.backbones.table import entry_of
from re2tal.detector import Detector
from re2tal.memory import Breakdown, StepMemory, explain_peak, predict_peak
from re2tal.memory.fit import largest_that_fits
from re2tal.memory.ways import PLAIN, prepare, residual_blocks
from re2tal.weights import without_weights

if TYPE_CHECKING:
    from pipelines.config.recipe import Recipe

# Frames of Video Swin's attention window, and a multiple of what other backbones require.
_UNIT = 16


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Model whose training step is predicted.

    Attributes:
        unit: window lengths are multiples of this number of frames.
        assemble: function that makes a detector, not rewired, with a given backbone.
        optimizer: also count AdamW's moments and the EMA of the weights.
    """

    name: str
    work: Workload
    backbone: Any  # a `BackboneConfig` with `depths`
    unit: int
    assemble: Callable[[Any], Detector[Any, Any]]
    optimizer: bool = False

    def size(self, memory: StepMemory) -> int:
        """Return the peak bytes of a step, plus optimizer and EMA if they are counted."""
        return memory.peak + (memory.kept_beside if self.optimizer else 0)

    @property
    def depth(self) -> int:
        """Number of blocks of the deepest stage."""
        deepest: int = max(self.backbone.depths)
        return deepest

    def build(self, depth: int, device: str | None = None) -> Detector[Any, Any]:
        """Make the detector, not rewired, with `depth` blocks in the deepest stage.

        Its weights are random on a device, and take no memory without one.
        """
        depths = list(self.backbone.depths)
        depths[depths.index(self.depth)] = depth
        make = partial(self.assemble, replace(self.backbone, depths=tuple(depths)))
        if device is None:
            return without_weights(make).train()
        with torch.device(device):
            return make().train()


class _Features(nn.Module):
    """Stand-in for a localizer that returns the features themselves."""

    num_classes = 0
    multiple = 1

    def predict(self, features: Tensor, mask: Tensor) -> tuple[Tensor]:  # noqa: ARG002
        return (features,)


def backbone_alone(name: str, work: Workload, addition: Addition | None = None) -> Subject:
    """Describe a backbone of the table without a localizer, from uint8 frames to features.

    Args:
        name: name in the table.
        work: the step.
        addition: adapters or LoRA, which alone are trained; None trains the whole backbone.

    Raises:
        UserError: if the table has no such name, or the backbone cannot have the addition.
        ValueError: if its depth cannot be changed.
    """
    config: Any = entry_of(name).make()
    _check_depths(config)
    multiple = without_weights(config.build).multiple
    if addition is not None:
        refuse_unused(addition, config, work.size)

    def assemble(shape: Any) -> Detector[Any, Any]:
        backbone = shape.build()
        if addition is not None:
            addition.add_to(backbone)
            backbone.requires_grad_(False)
            for part in additions(backbone):
                part.requires_grad_(requires_grad=True)
        return Detector(backbone, _Features())

    return Subject(
        name=name,
        work=work,
        backbone=config,
        unit=lcm(_UNIT, multiple),
        assemble=assemble,
    )


def of_recipe(recipe: Recipe) -> Subject:
    """Describe the detector of a recipe, reversible or not, with random weights and 20 classes.

    Raises:
        ValueError: if the depth of its backbone cannot be changed.
    """
    # imported here: a backbone alone can be predicted without PyAV
    from pipelines.training.model import build_detector

    def assemble(shape: Any) -> Detector[Any, Any]:
        model = replace(recipe.model, backbone=shape, reversible=False)
        return build_detector(replace(recipe, model=model), SOME_CLASSES, weights=None)

    config: Any = recipe.model.backbone
    _check_depths(config)
    backbone = without_weights(config.build)
    localizer = without_weights(
        partial(recipe.model.localizer.build, backbone.channels, len(SOME_CLASSES))
    )
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
            f"A {type(config).__name__} cannot be profiled: profiles vary the depth, and it has no "
            "field `depths`."
        )


@dataclass
class Planner:
    """Predictor of the memory of a model's steps in all ways of `WAYS`, with a cache.

    Its models have no weights: a thousand million parameters take no memory.
    """

    subject: Subject
    _detectors: dict[str, Detector[Any, Any]] = field(default_factory=dict)
    _steps: dict[tuple[str, int, int], StepMemory] = field(default_factory=dict)

    def blocks(self) -> list[str]:
        """List the backbone's residual blocks by their names in the detector."""
        backbone = self._detector(PLAIN, self.subject.depth).backbone
        return [f"backbone.{name}" for name in residual_blocks(backbone)]

    def explain(self, way: str) -> Breakdown:
        """Break down the peak of the subject's own step by origin."""
        work, depth = self.subject.work, self.subject.depth
        found = explain_peak(self._detector(way, depth), *work.inputs("meta"), step=work.forward)
        self._steps[way, work.frames, depth] = found.memory
        return found

    def predict(
        self, way: str, *, frames: int | None = None, depth: int | None = None
    ) -> StepMemory:
        """Predict the memory of a step, by default with the subject's frames and depth."""
        key = way, frames or self.subject.work.frames, depth or self.subject.depth
        if key not in self._steps:
            work = replace(self.subject.work, frames=key[1])
            detector = self._detector(way, key[2])
            self._steps[key] = predict_peak(detector, *work.inputs("meta"), step=work.forward)
        return self._steps[key]

    def peak(self, way: str, *, frames: int | None = None, depth: int | None = None) -> int:
        """Predict the bytes of a step; see `predict` and `Subject.size`."""
        return self.subject.size(self.predict(way, frames=frames, depth=depth))

    def measure(self, way: str) -> int | None:
        """Measure the peak bytes of a real step on the GPU; None if it runs out of memory.

        This is the CUDA allocator's peak. Parameters, gradients and inputs are included, as in a
        prediction; tensors that were allocated before are not.
        """
        work = self.subject.work
        before = torch.cuda.memory_allocated()
        try:
            model = self.subject.build(self.subject.depth, "cuda")
            prepare(model.backbone, way, for_gpu=True)
            inputs = work.inputs("cuda")
            torch.cuda.reset_peak_memory_stats()
            work.step(model, *inputs)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return None
        finally:
            torch.cuda.empty_cache()
        return torch.cuda.max_memory_allocated() - before

    def frames_that_fit(self, way: str, budget: int) -> int:
        """Find the longest window whose step fits into `budget` bytes; 0 frames if none does."""
        unit = self.subject.unit
        return unit * largest_that_fits(
            lambda units: self.peak(way, frames=units * unit),
            budget,
            start=max(1, self.subject.work.frames // unit),
            found={n // unit: size for n, size in self.predicted(way) if n % unit == 0},
        )

    def predicted(self, way: str) -> list[tuple[int, int]]:
        """List the predictions so far: frames of a window, and bytes."""
        steps = self._steps.items()
        known = {
            n: step for (one, n, depth), step in steps if (one, depth) == (way, self.subject.depth)
        }
        return [(n, self.subject.size(known[n])) for n in sorted(known)]

    def against_frames(self, way: str) -> list[tuple[int, int]]:
        """List points of a curve: frames of a window, and bytes."""
        unit, frames = self.subject.unit, self.subject.work.frames
        rounded = {max(1, round(share * frames / unit)) * unit for share in (0.25, 0.5, 2.0)}
        return [(n, self.peak(way, frames=n)) for n in sorted(rounded | {frames})]

    def against_depth(self, way: str) -> list[tuple[int, int]]:
        """List points of a curve: blocks of the deepest stage, and bytes."""
        depth = self.subject.depth
        return [(n, self.peak(way, depth=n)) for n in (depth, 2 * depth, 3 * depth)]

    def _detector(self, way: str, depth: int) -> Detector[Any, Any]:
        own = depth == self.subject.depth
        if own and way in self._detectors:
            return self._detectors[way]
        detector = self.subject.build(depth)
        prepare(detector.backbone, way, for_gpu=True)
        if own:  # the others are asked for once
            self._detectors[way] = detector
        return detector
