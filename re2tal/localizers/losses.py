"""Losses of localizers and their normalisers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torchvision.ops import sigmoid_focal_loss

MOMENTUM = 0.9  # of the running mean of positive points

# Lower bound of the denominators of overlaps.
SMALLEST = 1e-8


def focal_loss(
    logits: Tensor,
    classes: Tensor,
    valid: Tensor,
    *,
    smoothing: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum the sigmoid focal loss (Lin et al., ICCV 2017; alpha 0.25, gamma 2).

    Args:
        logits: `(B, P, K)`.
        classes: `(B, P, K)` in {0, 1}.
        valid: `(B, P)` bool, false at padded points, which have no loss.
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
    """Add the mean cross entropy of the positives and that of the negatives.

    Args:
        logits: `(B, A, K + 1)`; class 0 is the background.
        classes: `(B, A)` int64 in 0 to K.
        valid: `(B, A)` bool, false at anchors without a loss.
        all_ranks: see `mean_over`.

    Returns:
        A scalar in float32.
    """
    loss = F.cross_entropy(logits.float().transpose(1, 2), classes, reduction="none")
    positive = classes > 0
    negatives = mean_over(loss, valid & ~positive, all_ranks=all_ranks)
    return mean_over(loss, valid & positive, all_ranks=all_ranks) + negatives


def offset_iou(predicted: Tensor, actual: Tensor, positive: Tensor) -> Tensor:
    """Compute the IoU of segments given by distances to the left and right of a common point.

    Both segments contain the point. Hence the intersection is `min(left) + min(right)`, and the
    union is the sum of the lengths minus the intersection.

    Args:
        predicted: `(..., 2)` non-negative distances.
        actual: `(..., 2)` non-negative distances where `positive`.
        positive: `(...)` bool, true for pairs that count. The others may hold any finite values.

    Returns:
        `(...)` in float32; one, without a gradient, where not `positive`.
    """
    return _iou(*_counted(predicted, actual, positive))


def _iou(predicted: Tensor, actual: Tensor) -> Tensor:
    shared = torch.minimum(predicted, actual).sum(dim=-1)
    union = predicted.sum(dim=-1) + actual.sum(dim=-1) - shared
    return shared / union.clamp(min=SMALLEST)


def _counted(predicted: Tensor, actual: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    # Boolean indexing would make the host wait for the GPU; the loss of all points costs less.
    # Ones at the others keep IoU and gradients finite.
    chosen = positive[..., None]
    return torch.where(chosen, predicted.float(), 1.0), torch.where(chosen, actual.float(), 1.0)


def diou_loss(predicted: Tensor, actual: Tensor, positive: Tensor) -> Tensor:
    """Sum the distance-IoU loss in one dimension (Zheng et al., AAAI 2020, eq. 7).

    `1 - IoU + (distance of the centres / length of the smallest segment around both)^2`, for
    segments given by distances to the left and right of a common point.

    Args:
        predicted: `(..., 2)` non-negative distances.
        actual: `(..., 2)` non-negative distances where `positive`.
        positive: `(...)` bool, true for pairs that count. The others may hold any finite values.

    Returns:
        A scalar in float32, zero when nothing is positive.
    """
    predicted, actual = _counted(predicted, actual, positive)
    around = torch.maximum(predicted, actual).sum(dim=-1)
    overlap = _iou(predicted, actual)
    # The centre of a segment (left, right) is (right - left) / 2 from the point.
    distance = (predicted - actual).diff(dim=-1)[..., 0] / 2
    loss = 1 - overlap + (distance / around.clamp(min=SMALLEST)).square()
    return torch.where(positive, loss, 0).sum()


def giou_loss(
    predicted: Tensor, actual: Tensor, positive: Tensor, *, all_ranks: bool = False
) -> Tensor:
    """Average the generalised IoU loss in one dimension (Rezatofighi et al., CVPR 2019).

    `1 - IoU + (around - union) / around`, where `around` is the length of the smallest segment
    around both.

    Args:
        predicted: `(..., 2)` segments; where the end is before the start, the two are swapped.
        actual: `(..., 2)` segments where `positive`.
        positive: `(...)` bool, true for pairs that count. The others may hold any finite values.
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
    """Average `loss` where `chosen`; zero when nothing is chosen.

    Args:
        loss: tensor of any shape.
        chosen: bool tensor of the same shape.
        all_ranks: divide by the number chosen on all ranks, which must then all call this
            function. The average over ranks is then the mean over everything chosen on any rank.
    """
    total, ranks = over_ranks(chosen.sum()) if all_ranks else (chosen.sum(), 1)
    # Times the number of ranks, because DDP averages gradients over ranks.
    return torch.where(chosen, loss, 0).sum() * ranks / total.clamp(min=1)


def over_ranks(count: Tensor) -> tuple[Tensor, int]:
    """Sum a count over all ranks, which must all call this; return the sum and the world size."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return count, 1
    total = count.clone()
    distributed.all_reduce(total)
    return total, distributed.get_world_size()


class LossNormalizer(nn.Module):
    """Running mean of the number of positive points in a step, by which losses are divided.

    The mean steadies the loss when a step has few windows. It is a buffer, so a resumed run
    continues with it. Each step adds the sum over all its ranks and passes, so the mean does not
    depend on how the windows are split over them. All ranks must call the module equally often;
    in evaluation mode, where they need not, it counts nothing.
    """

    mean: Tensor

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(float(initial)))
        self.parts = 1  # passes of the step over all ranks
        self._counted = 0  # coming passes whose positives are already counted

    def count(self, positives: Tensor, *, passes: int) -> None:
        """Count a step before its passes: the loss of each is divided by the count of all.

        Args:
            positives: scalar number of positive points in all of this rank's passes.
            passes: number of forward passes of this rank in the step.
        """
        total, ranks = over_ranks(positives.detach().float())
        self.mean.copy_(MOMENTUM * self.mean + (1 - MOMENTUM) * total.clamp(min=1))
        self.parts, self._counted = ranks * passes, passes

    def forward(self, positives: Tensor) -> Tensor:
        """Return the divisor of a pass's losses.

        The losses' average over passes and ranks is then the loss of the step.

        Args:
            positives: scalar number of positive points of the pass. The pass is a step of its own
                unless `count` was called before.
        """
        if self.training:
            if not self._counted:
                self.count(positives, passes=1)
            self._counted -= 1
        return self.mean / self.parts


def _normalizers(model: nn.Module) -> list[LossNormalizer]:
    return [module for module in model.modules() if isinstance(module, LossNormalizer)]


def loss_parts(model: nn.Module) -> tuple[int, ...]:
    """Return the number of parts by which each normalizer of a model divides a step's losses."""
    return tuple(normalizer.parts for normalizer in _normalizers(model))


def divide_alike(copy: nn.Module, parts: Sequence[int]) -> None:
    """Make a copy divide its losses as the trained model does.

    Args:
        copy: copy of the model, such as its EMA.
        parts: `loss_parts` of the model whose steps were counted.
    """
    for normalizer, of_it in zip(_normalizers(copy), parts, strict=True):
        normalizer.parts = of_it
