"""The best of many scored places, as detections."""

from __future__ import annotations

from torch import Tensor

from re2tal.detection.segments import Detections


def best(scores: Tensor, segments: Tensor, counted: Tensor, *, most: int) -> Detections:
    """Detections of one sample by falling score; of equal scores the first place and class first.

    Args:
        scores: `(P, K)` of K classes at P places.
        segments: `(P, 2)` what was found at each place, in feature-grid units.
        counted: `(P, K)` bool, which of them may be detections.
        most: detections that are kept.
    """
    classes = scores.shape[1]
    flat = scores.flatten()
    candidates = counted.flatten().nonzero()[:, 0]
    order = flat[candidates].argsort(descending=True, stable=True)[:most]
    kept = candidates[order]
    return Detections(segments=segments[kept // classes], scores=flat[kept], labels=kept % classes)
