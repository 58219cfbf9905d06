"""Complete diagnosis; its numbers as table rows and as named metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from re2tal.annotations import Characteristics
from re2tal.detection.diagnosis.errors import (
    ERRORS,
    GROUPS,
    FalseNegatives,
    FalsePositives,
    Kind,
    Sensitivity,
    base_map,
    false_negatives,
    false_positives,
    sensitivity,
)
from re2tal.detection.diagnosis.outcomes import Placed, characterise, collect
from re2tal.detection.evaluation.matching import Floats
from re2tal.detection.evaluation.metrics import Row
from re2tal.detection.segments import Detections, LabelledSegments


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Error analysis of a detector.

    Attributes:
        thresholds: `(K,)` tIoU thresholds.
        left_out: number of instances of zero length, which nothing can overlap.
        mAP: `(K,)` normalised mAP of all predictions.
        placed: characteristic ("coverage", "length", "instances") -> bin of each instance.
        false_positives: profile of the top predictions.
        sensitivity: characteristic -> mAP over its bins.
        false_negatives: shares of missed instances.
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
    characteristics: Characteristics,
) -> Diagnosis:
    """Diagnose detections in the manner of DETAD (Alwassel et al., ECCV 2018).

    Every number is given at each threshold; DETAD's figures show the means over the thresholds
    (for ActivityNet 0.5, 0.55, ..., 0.95; for THUMOS-14 0.5 alone).

    Args:
        truth: video id -> instances in seconds (maybe none), for every video of the subset.
        predictions: video id -> predictions in seconds; videos may be missing or unknown.
        durations: video id -> duration in seconds, for every video with instances.
        num_classes: C; labels are 0 to C - 1.
        thresholds: K tIoU thresholds in (0, 1].
        characteristics: bins of length, coverage and number of instances, as in the record of a
            data set.

    Raises:
        ValueError: there are no instances, or a label, segment, score, threshold or duration is
            not valid.
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


def tables(diagnosis: Diagnosis) -> dict[str, list[Row]]:
    """Arrange the numbers of a diagnosis in tables.

    Shares and mAP lie in [0, 1]; an undefined value (the mAP of an empty bin) is None.

    Returns:
        `false_positives` (threshold, top, kind, predictions, share), `effects` (threshold, kind,
        gain), `sensitivity` (threshold, characteristic, bin, instances, mAP_N), `false_negatives`
        (threshold, characteristic, bin, instances, missed) and `false_negative_pairs` (the same
        for two characteristics).
    """
    return {
        "false_positives": list(_profile(diagnosis)),
        "effects": list(_effects(diagnosis)),
        "sensitivity": list(_sensitivity(diagnosis)),
        "false_negatives": list(_false_negatives(diagnosis)),
        "false_negative_pairs": list(_pairs(diagnosis)),
    }


def metrics(diagnosis: Diagnosis) -> dict[str, float]:
    """Average the main numbers over the thresholds, under names that trackers accept.

    Returns:
        `diagnosis/mAP_N`; `diagnosis/top_1G/<kind>`, the share among the top 1G predictions;
        `diagnosis/effect/<kind>`; `diagnosis/sensitivity/<characteristic>` and
        `diagnosis/impact/<characteristic>`; `diagnosis/mAP_N/<characteristic>/<bin>`;
        `diagnosis/missed` and `diagnosis/missed/<characteristic>/<bin>`. Undefined values are left
        out.
    """
    profile = diagnosis.false_positives
    top = profile.shares[:, 0].mean(axis=0)
    gains = profile.gains.mean(axis=0)
    values = {"mAP_N": float(diagnosis.mAP.mean())}
    values |= {f"top_1G/{_name(kind)}": float(top[kind]) for kind in Kind}
    values |= {
        f"effect/{_name(kind)}": float(gain) for kind, gain in zip(ERRORS, gains, strict=True)
    }
    values["missed"] = float(diagnosis.false_negatives.overall.mean())
    for name, placed in diagnosis.placed.items():
        of_bins = diagnosis.sensitivity[name]
        values[f"sensitivity/{name}"] = of_bins.sensitivity
        values[f"impact/{name}"] = of_bins.impact
        missed = diagnosis.false_negatives.by[name].average
        for bin_name, quality, share in zip(
            placed.bins.names, of_bins.average, missed, strict=True
        ):
            values[f"mAP_N/{name}/{bin_name}"] = float(quality)
            values[f"missed/{name}/{bin_name}"] = float(share)
    return {f"diagnosis/{name}": value for name, value in values.items() if np.isfinite(value)}


def _name(kind: Kind) -> str:
    return kind.name.lower()


def _number(value: float) -> float | None:
    """Convert to a Python float; NaN, which JSON does not have, becomes None."""
    return float(value) if np.isfinite(value) else None


def _profile(diagnosis: Diagnosis) -> Iterator[Row]:
    profile = diagnosis.false_positives
    for level, threshold in enumerate(diagnosis.thresholds):
        for group in range(GROUPS):
            for kind in Kind:
                yield {
                    "threshold": float(threshold),
                    "top": f"{group + 1}G",
                    "kind": _name(kind),
                    "predictions": int(profile.counts[level, group, kind]),
                    "share": _number(profile.shares[level, group, kind]),
                }


def _effects(diagnosis: Diagnosis) -> Iterator[Row]:
    gains = diagnosis.false_positives.gains
    for level, threshold in enumerate(diagnosis.thresholds):
        for number, kind in enumerate(ERRORS):
            yield {
                "threshold": float(threshold),
                "kind": _name(kind),
                "gain": float(gains[level, number]),
            }


def _sensitivity(diagnosis: Diagnosis) -> Iterator[Row]:
    for level, threshold in enumerate(diagnosis.thresholds):
        for name, placed in diagnosis.placed.items():
            values = diagnosis.sensitivity[name].mAP[level]
            for bin_name, count, value in zip(
                placed.bins.names, placed.counts, values, strict=True
            ):
                yield {
                    "threshold": float(threshold),
                    "characteristic": name,
                    "bin": bin_name,
                    "instances": int(count),
                    "mAP_N": _number(value),
                }


def _false_negatives(diagnosis: Diagnosis) -> Iterator[Row]:
    for level, threshold in enumerate(diagnosis.thresholds):
        for name, placed in diagnosis.placed.items():
            missed = diagnosis.false_negatives.by[name]
            for number, bin_name in enumerate(placed.bins.names):
                yield {
                    "threshold": float(threshold),
                    "characteristic": name,
                    "bin": bin_name,
                    "instances": int(missed.counts[number]),
                    "missed": _number(missed.shares[level, number]),
                }


def _pairs(diagnosis: Diagnosis) -> Iterator[Row]:
    for level, threshold in enumerate(diagnosis.thresholds):
        for (first, second), missed in diagnosis.false_negatives.by_pair.items():
            for row, column in np.ndindex(missed.counts.shape):
                yield {
                    "threshold": float(threshold),
                    "characteristic": first,
                    "bin": diagnosis.placed[first].bins.names[row],
                    "second characteristic": second,
                    "second bin": diagnosis.placed[second].bins.names[column],
                    "instances": int(missed.counts[row, column]),
                    "missed": _number(missed.shares[level, row, column]),
                }
