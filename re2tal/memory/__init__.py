"""Memory of a training step: measurement, counting and prediction."""

from re2tal.memory.live import LiveBytes, MemoryMeter, StepMemory
from re2tal.memory.operators import work_of_pieces
from re2tal.memory.prediction import (
    Breakdown,
    Origin,
    explain_peak,
    measure_activations,
    predict_peak,
)

__all__ = [
    "Breakdown",
    "LiveBytes",
    "MemoryMeter",
    "Origin",
    "StepMemory",
    "explain_peak",
    "measure_activations",
    "predict_peak",
    "work_of_pieces",
]
