"""Detector that a recipe describes: construction, frozen parts, coupling, remarks."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipelines.config.clip_recipes import AnyRecipe
from pipelines.config.recipe import BackboneModelConfig, ModelConfig, Recipe
from pipelines.data.plan import ACTION
from re2tal.backbones.adapters import additions
from re2tal.backbones.weights import load_backbone_weights
from re2tal.detector import Detector
from re2tal.localizers.protocol import require_localizer
from re2tal.localizers.weights import load_localizer_weights
from re2tal.reversible.controls import CouplingSchedule, set_reversible, set_slice_bytes
from re2tal.reversible.convolutions import WRONG_GRADIENTS, wrong_gradients
from re2tal.reversible.coupling import SMALLEST_PIECE
from re2tal.trained import DetectorSpec
from re2tal.weights import WeightsReport

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


def freeze(detector: Detector[Any, Any], config: BackboneModelConfig) -> None:
    """Turn off the gradients of frozen parts.

    Args:
        detector: detector that is changed.
        config: names of frozen parts, and treatment of the backbone's norms.

    Raises:
        ValueError: if the detector has no part of that name.
    """
    for part in _parts(detector, config.kept):
        part.requires_grad_(requires_grad=False)
    for part in additions(detector.backbone):  # adapters are trained within frozen parts too
        part.requires_grad_(requires_grad=True)
    if config.norms == "frozen":
        for module in detector.backbone.modules():
            if isinstance(module, _NORMS):
                module.requires_grad_(requires_grad=False)


def train_mode(detector: Detector[Any, Any], config: BackboneModelConfig) -> None:
    """Set training mode, except for frozen parts and BatchNorms that keep their statistics."""
    detector.train()
    for part in _parts(detector, config.kept):
        part.eval()
    for part in additions(detector.backbone):
        part.train()
    if config.norms != "trained":
        for module in detector.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _parts(detector: Detector[Any, Any], names: tuple[str, ...]) -> Iterator[nn.Module]:
    modules = dict(detector.named_modules())
    for name in names:
        if name not in modules:
            known = ", ".join(n for n in modules if n.count(".") < 2 and n)
            raise ValueError(
                f"--model.frozen: the detector has no part {name!r}. It has {known} and parts of "
                "these."
            )
        yield modules[name]


def build_prepared(
    spec: DetectorSpec, weights: str | Path | None, config: BackboneModelConfig
) -> Detector[Any, Any]:
    """Build a detector with its backbone's weights, choose how stages run, and freeze parts.

    Args:
        spec: specification of the detector.
        weights: file or name of backbone weights, or None.
        config: normalization of frames, size of pieces, names of frozen parts, treatment of norms.

    Raises:
        ValueError: if the weights do not fit the backbone, or were trained on frames normalized by
            other values; if a part that is to be frozen does not exist.
    """

    def load(backbone: nn.Module) -> None:
        if weights is not None:
            report = load_backbone_weights(backbone, weights)
            report.require_normalization(config.mean, config.std, option="--model.")

    detector = spec.build(load)
    if config.slice_mb is not None:
        set_slice_bytes(detector, config.slice_mb * 2**20)
    if config.stored:
        set_reversible(detector, reversible=False)
    freeze(detector, config)
    return detector


def run_as_on(device: str, detector: nn.Module, config: BackboneModelConfig) -> None:
    """Make a detector on a CPU run as it would on another device, to predict its memory.

    Args:
        device: "cpu" or "cuda".
        detector: detector that is rewired if the configuration says so.
        config: pieces, and whether activations are stored.
    """
    if config.reversible:
        own = None if config.slice_mb is None else config.slice_mb * 2**20
        set_slice_bytes(detector, own or SMALLEST_PIECE[device])
        set_reversible(detector, reversible=not config.stored)


def load_localizer(detector: Detector[Any, Any], config: ModelConfig) -> WeightsReport | None:
    """Load the localizer's initial weights, if the configuration names some.

    Args:
        detector: detector that receives them.
        config: configuration that names a file on this machine.

    Raises:
        ValueError: if they do not fit the localizer.
    """
    if config.localizer_weights is None:
        return None
    return load_localizer_weights(detector.localizer, config.localizer_weights)


def detected_classes(recipe: Recipe, classes: Sequence[str]) -> tuple[str, ...]:
    """Return the classes that the recipe's detector distinguishes, given the data set's classes."""
    return (ACTION,) if recipe.model.class_agnostic else tuple(classes)


def reported_classes(recipe: Recipe, classes: Sequence[str]) -> tuple[str, ...]:
    """Return the classes of the detections that the recipe's evaluation produces.

    They are the detector's, unless an external classifier assigns classes to its proposals.
    """
    return tuple(classes) if recipe.data.video_scores else detected_classes(recipe, classes)


def spec_of(recipe: Recipe, classes: Sequence[str]) -> DetectorSpec:
    """Return the specification from which the recipe's detector is built."""
    return DetectorSpec(
        classes=detected_classes(recipe, classes),
        backbone=recipe.model.backbone,
        localizer=recipe.model.localizer,
        reversible=recipe.model.reversible,
        size=recipe.data.size,
        window=recipe.data.window,
        nms=recipe.nms,
        mean=recipe.model.mean,
        std=recipe.model.std,
        **recipe.model.added,
    )


def build_detector(
    recipe: Recipe, classes: Sequence[str], weights: str | Path | None
) -> Detector[Any, Any]:
    """Build the detector, with pretrained weights in its backbone.

    Args:
        recipe: configuration of the run.
        classes: names of the action classes.
        weights: file or name of backbone weights, or None.

    Raises:
        UserError: the localizer lacks parts.
        ValueError: see `build_prepared`.
    """
    detector = build_prepared(spec_of(recipe, classes), weights, recipe.model)
    require_localizer(detector.localizer)
    return detector


def connect(
    model: nn.Module, config: BackboneModelConfig, *, done: int, steps: int
) -> dict[str, float]:
    """Set the coupling (Dr2Net's alpha and beta) of a step; see `CouplingSchedule`.

    Args:
        model: model with a rewired backbone.
        config: number of epochs over which the coupling moves; with None, nothing is done.
        done: number of steps before this one.
        steps: number of steps of an epoch.

    Returns:
        Metrics: alpha and beta.
    """
    if config.coupling_epochs is None:
        return {}
    schedule = CouplingSchedule(steps=max(1, round(config.coupling_epochs * steps)))
    coupling = schedule.apply(model, done)
    return {"coupling/alpha": coupling.alpha, "coupling/beta": coupling.beta}


def remarks(recipe: AnyRecipe, nodes: list[dict[str, Any]]) -> list[str]:
    """List reasons, in sentences, why a run with a backbone is slower than expected.

    Args:
        recipe: configuration of the run.
        nodes: nodes of the cluster, as `ray.nodes` lists them.
    """
    found = [remark] if (remark := _store_remark(recipe, nodes)) else []
    if recipe.optim.precision == "bfloat16" and not recipe.scale.gpu and wrong_gradients():
        found.append(WRONG_GRADIENTS)
    return found


def _store_remark(recipe: AnyRecipe, nodes: list[dict[str, Any]]) -> str | None:
    """Return a warning if the frames on their way to the workers exceed the object store.

    The run would work, but slowly, because Ray spills to disk.
    """
    data = recipe.data
    size = max(data.size, data.augmentation.decoded_size(data.size))
    batch = recipe.batch_size * data.window.frames * size * size * 3  # bytes of RGB
    stores = [
        node["Resources"].get("object_store_memory", 0.0)
        for node in nodes
        if node["Alive"] and node["Resources"].get("CPU", 0.0) > 0  # else no worker is there
    ]
    if not stores:
        return None  # no node that can hold a worker has started yet
    from pipelines.data.streaming import store_needed  # here, since training alone needs no Ray

    scale = recipe.scale
    workers = math.ceil((scale.workers + scale.validation_workers) / len(stores))
    need, have = workers * store_needed(batch), min(stores)
    if need <= have:
        return None
    return (
        f"The frames on their way to {workers} workers of a node need an object store of "
        f"{need / 2**30:.1f} GiB, but it has {have / 2**30:.1f}: Ray will spill to the disk. Start "
        "it with a larger one (ray start --object-store-memory), or lower --batch-size."
    )
