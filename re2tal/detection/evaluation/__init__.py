"""Metrics of detections: mean average precision, AR@AN of proposals, and Recall@kx."""

from re2tal.detection.evaluation.metrics import (
    METRICS,
    ClassRecall,
    Compared,
    MapResult,
    ProposalRecall,
    Result,
    Row,
    average_recall,
    evaluate,
    mean_average_precision,
    recall_at,
)

__all__ = [
    "METRICS",
    "ClassRecall",
    "Compared",
    "MapResult",
    "ProposalRecall",
    "Result",
    "Row",
    "average_recall",
    "evaluate",
    "mean_average_precision",
    "recall_at",
]
