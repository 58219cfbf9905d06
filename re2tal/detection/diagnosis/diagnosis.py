"""All parts of the diagnosis together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from re2tal.detection.diagnosis.characteristics import (
    ACTIVITYNET,
    Characteristics,
    Placed,
    characterise,
)
from re2tal.detection.diagnosis.false_negatives import FalseNegatives, false_negatives
from re2tal.detection.diagnosis.false_positives import FalsePositives, false_positives
from re2tal.detection.diagnosis.outcomes import Floats, collect
from re2tal.detection.diagnosis.sensitivity import Sensitivity, base_map, sensitivity
from re2tal.detection.segments import Detections, LabelledSegments


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What a detector gets wrong.

    Attributes:
        thresholds: `(K,)` tIoU thresholds.
        left_out: instances without length, which nothing can overlap.
        mAP: `(K,)` normalised mAP of all predictions.
        placed: of each characteristic ("coverage", "length", "instances"), the bin of each
            instance.
        false_positives: what the top predictions are.
        sensitivity: of each characteristic, mAP over its bins.
        false_negatives: which instances are missed.
    """

    thresholds: Floats
    left_out: int
    mAP: Floats  # noqa: N815 - the field writes it so
    placed: Mapping[str, Placed]
    false_positives: FalsePositives
    sensitivity: Mapping[str, Sensitivity]
    false_negatives: FalseNegatives


def diagnose(
    truth: Mapping[str, LabelledSegments],
    predictions: Mapping[str, Detections],
    durations: Mapping[str, float],
    *,
    num_classes: int,
    thresholds: Sequence[float],
    characteristics: Characteristics = ACTIVITYNET,
) -> Diagnosis:
    """Diagnoses detections in the manner of DETAD (Alwassel et al., ECCV 2018).

    Every number is given at each threshold; DETAD's figures show the means over the thresholds
    (for ActivityNet 0.5, 0.55, ..., 0.95; for THUMOS-14 0.5 alone).

    Args:
        truth: of every video of the evaluated subset, its instances (maybe none), in seconds.
        predictions: by video, in seconds; videos may be missing or unknown.
        durations: seconds of every video with instances.
        num_classes: C; labels are 0 to C - 1.
        thresholds: K tIoU thresholds in (0, 1].
        characteristics: how length, coverage and number of instances are cut into bins.

    Returns:
        The diagnosis.

    Raises:
        ValueError: If there is nothing to find, or a label, segment, score, threshold or duration
            is not one.
    """
    outcomes = collect(truth, predictions, num_classes=num_classes, thresholds=thresholds)
    placed = characterise(outcomes, durations, characteristics)
    base = base_map(outcomes)
    return Diagnosis(
        thresholds=outcomes.thresholds,
        left_out=outcomes.left_out,
        mAP=base,
        placed=placed,
        false_positives=false_positives(outcomes),
        sensitivity={name: sensitivity(outcomes, one, base) for name, one in placed.items()},
        false_negatives=false_negatives(outcomes, placed),
    )
