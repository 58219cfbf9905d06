"""Diagnosis of a detector's errors, in the manner of DETAD (Alwassel et al., ECCV 2018)."""

from re2tal.detection.diagnosis.errors import (
    ERRORS,
    FalseNegatives,
    FalsePositives,
    Kind,
    Missed,
    Sensitivity,
)
from re2tal.detection.diagnosis.outcomes import Placed
from re2tal.detection.diagnosis.report import Diagnosis, diagnose, metrics, tables

__all__ = [
    "ERRORS",
    "Diagnosis",
    "FalseNegatives",
    "FalsePositives",
    "Kind",
    "Missed",
    "Placed",
    "Sensitivity",
    "diagnose",
    "metrics",
    "tables",
]
