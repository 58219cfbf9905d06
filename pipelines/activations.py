"""The activations of one training step of a recipe, predicted and, where it is cheap, measured."""

import psutil

from pipelines.planner.step import workload_of
from pipelines.recipes import Recipe
from re2tal.detector import Detector
from re2tal.memory import measure_activations, predict_peak

# Measuring runs a step on the CPU: a recipe for a large GPU would fill the host's memory.
_MEASURED_UP_TO = 0.1


def activation_metrics(recipe: Recipe, detector: Detector) -> dict[str, float]:
    """Counts the bytes that one worker's step keeps alive.

    Args:
        recipe: the run's configuration.
        detector: what it builds; its weights do not matter and stay as they are.

    Returns:
        `memory/predicted_activations_mb` and `memory/predicted_peak_mb` from fake tensors; if the
        peak is below a tenth of this host's free memory also `memory/measured_...`, from real ones.
        Megabytes of 10^6 bytes.
    """
    detector.train()
    work = workload_of(recipe)
    inputs = work.inputs()
    predicted = predict_peak(detector, *inputs, step=work.step)
    metrics = {
        "memory/predicted_activations_mb": predicted.metrics()["activations_mb"],
        "memory/predicted_peak_mb": predicted.metrics()["peak_mb"],
    }
    if predicted.peak < _MEASURED_UP_TO * psutil.virtual_memory().available:
        measured = measure_activations(detector, *inputs, step=work.step).metrics()
        metrics["memory/measured_activations_mb"] = measured["activations_mb"]
        metrics["memory/measured_peak_mb"] = measured["peak_mb"]
    return metrics
