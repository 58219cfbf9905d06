"""Diagnosis of a detector's errors, in the manner of DETAD (Alwassel et al., ECCV 2018)."""

from re2tal.detection.diagnosis.characteristics import (
    ACTIVITYNET,
    THUMOS,
    Bins,
    Characteristics,
    Placed,
)
from re2tal.detection.diagnosis.diagnosis import Diagnosis, diagnose
from re2tal.detection.diagnosis.false_negatives import FalseNegatives, Missed
from re2tal.detection.diagnosis.false_positives import ERRORS, FalsePositives, Kind
from re2tal.detection.diagnosis.report import metrics, tables
from re2tal.detection.diagnosis.sensitivity import Sensitivity

__all__ = [
    "ACTIVITYNET",
    "ERRORS",
    "THUMOS",
    "Bins",
    "Characteristics",
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
