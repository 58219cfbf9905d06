"""The detector that a recipe describes."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.recipe import Recipe
from pipelines.start import prepare
from re2tal.detector import Detector
from re2tal.trained import DetectorSpec

# The one class of a class-agnostic detector.
ACTION = "action"


def detected_classes(recipe: Recipe, classes: Sequence[str]) -> tuple[str, ...]:
    """Returns the classes that the recipe's detector tells apart.

    Args:
        recipe: the run's configuration.
        classes: names of the action classes of the data set.
    """
    return (ACTION,) if recipe.model.class_agnostic else tuple(classes)


def reported_classes(recipe: Recipe, classes: Sequence[str]) -> tuple[str, ...]:
    """Returns the classes of the detections that the recipe's evaluation makes.

    They are the detector's, unless an external classifier names the class of its proposals.

    Args:
        recipe: the run's configuration.
        classes: names of the action classes of the data set.
    """
    return tuple(classes) if recipe.data.video_scores else detected_classes(recipe, classes)


def spec_of(recipe: Recipe, classes: Sequence[str]) -> DetectorSpec:
    """Returns what the recipe's detector is built of.

    Args:
        recipe: the run's configuration.
        classes: names of the action classes.
    """
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
    )


def build_detector(recipe: Recipe, classes: Sequence[str], weights: str | Path | None) -> Detector:
    """Builds the detector, with pretrained weights in its backbone.

    Args:
        recipe: the run's configuration.
        classes: names of the action classes.
        weights: file or name of backbone weights, or None.

    Raises:
        ValueError: see `prepare`.
    """
    detector = spec_of(recipe, classes).build()
    prepare(detector, weights, recipe.model)
    return detector
