"""Metrics of detections: mean average precision, and recall in its two usual forms."""

from re2tal.detection.evaluation.metrics import (
    ClassRecall,
    MapResult,
    ProposalRecall,
    average_recall,
    mean_average_precision,
    recall_at,
)

__all__ = [
    "ClassRecall",
    "MapResult",
    "ProposalRecall",
    "average_recall",
    "mean_average_precision",
    "recall_at",
]
