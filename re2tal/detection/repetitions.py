"""One detection of what two views of the same stretch of video both show."""

from __future__ import annotations

import torch
from torch import Tensor

from re2tal.detection.segments import Detections, tiou


def without_repetitions(found: Detections, second: Tensor, *, iou: float) -> Detections:
    """Hard non-maximum suppression between two views, within each class.

    Sequentially: of what is left, the detection with the highest score (of equals, the first) is
    kept, and those of its class go that the other view shows and that overlap it by at least
    `iou`. Detections in one view do not suppress one another.

    Args:
        found: N detections in both views, in one unit.
        second: `(N,)` whether a detection is the second view's.
        iou: the overlap from which two detections are of the same action, above 0.

    Returns:
        What is left, in its order.
    """
    order = found.scores.argsort(descending=True, stable=True)
    ranked, view = found[order], second[order]
    same = (ranked.labels[:, None] == ranked.labels) & (view[:, None] != view)
    same &= tiou(ranked.segments[:, None], ranked.segments) >= iou
    kept = torch.ones(len(found), dtype=torch.bool)
    for row in same.any(dim=1).nonzero()[:, 0].tolist():
        if kept[row]:  # those before it that repeat it are gone already
            kept &= ~same[row]
    return found[order[kept].sort().values]
