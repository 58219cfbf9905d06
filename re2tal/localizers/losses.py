"""Losses of localizers, and the counts by which they are divided."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torchvision.ops import sigmoid_focal_loss

MOMENTUM = 0.9

# Denominators of overlaps are at least this.
SMALLEST = 1e-8


def focal_loss(
    logits: Tensor,
    classes: Tensor,
    valid: Tensor,
    *,
    smoothing: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum up the sigmoid focal loss (Lin et al., ICCV 2017; alpha 0.25, gamma 2).

    Args:
        logits: `(B, P, K)`.
        classes: `(B, P, K)` in {0, 1}.
        valid: `(B, P)` bool, false at points that lie on padding and count nothing.
        smoothing: share of the targets that is spread over the K classes and the background.
        weights: `(B, P, K)` factors; None for ones.

    Returns:
        A scalar in float32.
    """
    soft = classes * (1 - smoothing) + smoothing / (logits.shape[-1] + 1)
    loss = sigmoid_focal_loss(logits.float(), soft, alpha=0.25, gamma=2.0, reduction="none")
    loss = loss if weights is None else loss * weights
    return torch.where(valid[..., None], loss, 0).sum()


def balanced_cross_entropy(
    logits: Tensor, classes: Tensor, valid: Tensor, *, all_ranks: bool = False
) -> Tensor:
    """Average the cross entropy over the positives, and add its average over the negatives.

    Args:
        logits: `(B, A, K + 1)`, of which the first is that of the background.
        classes: `(B, A)` int64 in 0 to K.
        valid: `(B, A)` bool, false at anchors that count nothing.
        all_ranks: see `mean_over`.

    Returns:
        A scalar in float32.
    """
    loss = F.cross_entropy(logits.float().transpose(1, 2), classes, reduction="none")
    positive = classes > 0
    negatives = mean_over(loss, valid & ~positive, all_ranks=all_ranks)
    return mean_over(loss, valid & positive, all_ranks=all_ranks) + negatives


def offset_iou(predicted: Tensor, actual: Tensor, positive: Tensor) -> Tensor:
    """Compute the IoU of segments given by their distances to both sides of a common point.

    Args:
        predicted: `(..., 2)` non-negative distances.
        actual: `(..., 2)` non-negative distances where `positive`.
        positive: `(...)` bool, true for pairs that count. The others may hold anything finite.

    Returns:
        `(...)` in float32; one, without a gradient, where not `positive`.
    """
    return _iou(*_counted(predicted, actual, positive))


def _iou(predicted: Tensor, actual: Tensor) -> Tensor:
    shared = torch.minimum(predicted, actual).sum(dim=-1)
    union = predicted.sum(dim=-1) + actual.sum(dim=-1) - shared
    return shared / union.clamp(min=SMALLEST)


def _counted(predicted: Tensor, actual: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    # The loss of all points costs less than picking the positive ones, which makes a GPU wait.
    chosen = positive[..., None]
    return torch.where(chosen, predicted.float(), 1.0), torch.where(chosen, actual.float(), 1.0)


def diou_loss(predicted: Tensor, actual: Tensor, positive: Tensor) -> Tensor:
    """Sum up the distance-IoU loss in one dimension (Zheng et al., AAAI 2020, eq. 7).

    `1 - IoU + (distance of the centres / length of the smallest segment around both)^2` of
    segments given by their distances to the left and to the right of a common point.

    Args:
        predicted: `(..., 2)` non-negative distances.
        actual: `(..., 2)` non-negative distances where `positive`.
        positive: `(...)` bool, true for pairs that count. The others may hold anything finite.

    Returns:
        A scalar in float32, zero when nothing is positive.
    """
    predicted, actual = _counted(predicted, actual, positive)
    around = torch.maximum(predicted, actual).sum(dim=-1)
    overlap = _iou(predicted, actual)
    distance = (predicted - actual).diff(dim=-1)[..., 0] / 2
    loss = 1 - overlap + (distance / around.clamp(min=SMALLEST)).square()
    return torch.where(positive, loss, 0).sum()


def giou_loss(
    predicted: Tensor, actual: Tensor, positive: Tensor, *, all_ranks: bool = False
) -> Tensor:
    """Average the generalised IoU loss in one dimension (Rezatofighi et al., CVPR 2019).

    `1 - IoU + (length of the smallest segment around both - union) / the former`.

    Args:
        predicted: `(..., 2)` segments; one given the wrong way round counts as turned.
        actual: `(..., 2)` segments where `positive`.
        positive: `(...)` bool, true for pairs that count. The others may hold anything finite.
        all_ranks: see `mean_over`.

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


def mean_over(loss: Tensor, chosen: Tensor, *, all_ranks: bool) -> Tensor:
    """Average `loss` where `chosen`; zero when nothing is.

    Args:
        loss: tensor of any shape.
        chosen: bool tensor of the same shape.
        all_ranks: divide by the number chosen on all ranks, which then must all call this, so that
            the mean of the ranks' results is the mean over all that is chosen.
    """
    total, ranks = over_ranks(chosen.sum()) if all_ranks else (chosen.sum(), 1)
    return torch.where(chosen, loss, 0).sum() * ranks / total.clamp(min=1)


def over_ranks(count: Tensor) -> tuple[Tensor, int]:
    """Sum a count over all ranks, which must all call this; return it and their number.

    Args:
        count: count of this rank.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return count, 1
    total = count.clone()
    distributed.all_reduce(total)
    return total, distributed.get_world_size()


class LossNormalizer(nn.Module):
    """Running mean of the number of a step's positive points, by which losses are divided.

    It steadies the loss when a step has few windows. The buffer is part of the state, so a resumed
    run continues with it. It follows the sum over all ranks and all passes of a step, however the
    windows of the step are laid out: all ranks must call it as often, which is why it counts only
    in training mode.
    """

    mean: Tensor

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(float(initial)))
        self._parts = 1  # passes of the step over all ranks
        self._counted = 0  # passes to come whose positives are counted already

    def count(self, positives: Tensor, *, passes: int) -> None:
        """Count a step ahead of its passes, because each is divided by what all of them hold.

        Args:
            positives: scalar number of positive points in all of this rank's passes.
            passes: number of forward passes of this rank in the step.
        """
        total, ranks = over_ranks(positives.detach().float())
        self.mean.copy_(MOMENTUM * self.mean + (1 - MOMENTUM) * total.clamp(min=1))
        self._parts, self._counted = ranks * passes, passes

    def follow(self, other: LossNormalizer) -> None:
        """Take over the number of parts that the steps of another one have."""
        self._parts = other._parts

    def forward(self, positives: Tensor) -> Tensor:
        """Return the divisor of a pass's losses: their mean over the passes is then the step's.

        Args:
            positives: scalar number of positive points of the pass, which is a step of its own
                unless `count` was called ahead.
        """
        if self.training:
            if not self._counted:
                self.count(positives, passes=1)
            self._counted -= 1
        return self.mean / self._parts


def divide_alike(copy: nn.Module, original: nn.Module) -> None:
    """Have a copy's losses, of a batch, divided as those of the model that is trained.

    Args:
        copy: copy of the model's weights, such as their moving average.
        original: model whose steps were counted.
    """
    for ours, theirs in zip(copy.modules(), original.modules(), strict=True):
        if isinstance(ours, LossNormalizer) and isinstance(theirs, LossNormalizer):
            ours.follow(theirs)
