"""How good detections are: mean average precision, and recall in its two usual forms."""

from re2tal.detection.evaluation.average_precision import MapResult, mean_average_precision
from re2tal.detection.evaluation.recall import (
    ClassRecall,
    ProposalRecall,
    average_recall,
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
