"""Meters: what a training step did use, and what it will use."""

from re2tal.memory.meter import MemoryMeter
from re2tal.memory.prediction import LiveBytes, StepMemory, measure_activations, predict_peak

__all__ = ["LiveBytes", "MemoryMeter", "StepMemory", "measure_activations", "predict_peak"]
