"""Activations of one training step of a recipe: predicted and, if that is cheap, also measured."""

from typing import Any

from pipelines.config.recipe import Recipe
from pipelines.training.model import run_as_on
from pipelines.training.workload import workload_of
from re2tal.detector import Detector
from re2tal.memory import measure_activations, predict_peak

# Measuring runs a step on the driver's CPU, which takes minutes for a step made for a GPU.
_MEASURED_UP_TO = 500_000_000


def activation_metrics(recipe: Recipe, detector: Detector[Any, Any]) -> dict[str, float]:
    """Count the bytes that one worker's step keeps alive.

    Args:
        recipe: configuration of the run.
        detector: detector that the recipe builds; its weights do not matter and stay as they are.
            For a GPU it is rewired to run in pieces of a GPU's size.

    Returns:
        `memory/predicted_activations_mb` and `memory/predicted_peak_mb` from fake tensors; if the
        peak is below 500 MB also `memory/measured_...`, from real ones. Megabytes of 10^6 bytes.
    """
    detector.train()
    run_as_on("cuda" if recipe.scale.gpu else "cpu", detector, recipe.model)
    work = workload_of(recipe)
    predicted = predict_peak(detector, *work.inputs("meta"), step=work.forward)
    metrics = {
        "memory/predicted_activations_mb": predicted.metrics()["activations_mb"],
        "memory/predicted_peak_mb": predicted.metrics()["peak_mb"],
    }
    if predicted.peak < _MEASURED_UP_TO:
        measured = measure_activations(detector, *work.inputs(), step=work.forward).metrics()
        metrics["memory/measured_activations_mb"] = measured["activations_mb"]
        metrics["memory/measured_peak_mb"] = measured["peak_mb"]
    return metrics
