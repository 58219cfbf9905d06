"""VSGN's losses of classes and segments, both in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from re2tal.localizers.losses import over_ranks

SMALLEST = 1e-8


def mean_over(loss: Tensor, chosen: Tensor, *, all_ranks: bool) -> Tensor:
    """The mean of `loss` where `chosen`, zero when nothing is.

    Args:
        loss: of any shape.
        chosen: bool of the same shape.
        all_ranks: divide by what is chosen on all ranks, which then must all call this, so that the
            mean of the ranks' results is that of all of it.
    """
    total, ranks = over_ranks(chosen.sum()) if all_ranks else (chosen.sum(), 1)
    return torch.where(chosen, loss, 0).sum() * ranks / total.clamp(min=1)


def balanced_cross_entropy(
    logits: Tensor, classes: Tensor, valid: Tensor, *, all_ranks: bool = False
) -> Tensor:
    """Mean cross entropy of the positives plus that of the negatives.

    Args:
        logits: `(B, A, K + 1)`, of which the first is that of the background.
        classes: `(B, A)` int64 in 0 to K.
        valid: `(B, A)` bool, false at anchors that count nothing.
        all_ranks: as `mean_over`.

    Returns:
        A scalar in float32.
    """
    loss = F.cross_entropy(logits.float().transpose(1, 2), classes, reduction="none")
    positive = classes > 0
    negatives = mean_over(loss, valid & ~positive, all_ranks=all_ranks)
    return mean_over(loss, valid & positive, all_ranks=all_ranks) + negatives


def giou_loss(
    predicted: Tensor, actual: Tensor, positive: Tensor, *, all_ranks: bool = False
) -> Tensor:
    """Mean of the generalised IoU loss in one dimension (Rezatofighi et al., CVPR 2019).

    `1 - IoU + (length of the smallest segment around both - union) / the former`.

    Args:
        predicted: `(..., 2)` segments; one given the wrong way round counts as turned.
        actual: `(..., 2)` segments where `positive`.
        positive: `(...)` bool, which pairs count. The others may hold anything finite.
        all_ranks: as `mean_over`.

    Returns:
        A scalar in float32, zero when nothing is positive.
    """
    start, end = predicted.float().amin(dim=-1), predicted.float().amax(dim=-1)
    actual_start, actual_end = actual.float().unbind(dim=-1)
    shared = (torch.minimum(end, actual_end) - torch.maximum(start, actual_start)).clamp(min=0)
    union = (end - start) + (actual_end - actual_start) - shared
    around = torch.maximum(end, actual_end) - torch.minimum(start, actual_start)
    overlap = shared / union.clamp(min=SMALLEST)
    loss = 1 - overlap + (around - union) / around.clamp(min=SMALLEST)
    return mean_over(loss, positive, all_ranks=all_ranks)
