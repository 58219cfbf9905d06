"""The losses of a point-based localizer and their common normaliser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import sigmoid_focal_loss

from re2tal.localizers.protocol import Targets

MOMENTUM = 0.9


def focal_loss(logits: Tensor, classes: Tensor, valid: Tensor, *, smoothing: float) -> Tensor:
    """Sum of the sigmoid focal loss (Lin et al., ICCV 2017; alpha 0.25, gamma 2).

    Args:
        logits: `(B, P, K)`.
        classes: `(B, P, K)` in {0, 1}.
        valid: `(B, P)` bool, false at points that lie on padding and count nothing.
        smoothing: a share of the targets that is spread over the K classes and the background.

    Returns:
        A scalar in float32.
    """
    soft = classes * (1 - smoothing) + smoothing / (logits.shape[-1] + 1)
    loss = sigmoid_focal_loss(logits.float(), soft, alpha=0.25, gamma=2.0, reduction="none")
    return torch.where(valid[..., None], loss, 0).sum()


def diou_loss(predicted: Tensor, actual: Tensor, positive: Tensor) -> Tensor:
    """Sum of the distance-IoU loss in one dimension (Zheng et al., AAAI 2020, eq. 7).

    `1 - IoU + (distance of the centres / length of the smallest segment around both)^2` of
    segments given by their distances to the left and to the right of a common point.

    Args:
        predicted: `(..., 2)` non-negative distances.
        actual: `(..., 2)` non-negative distances where `positive`.
        positive: `(...)` bool, which pairs count. The others may hold anything finite.

    Returns:
        A scalar in float32, zero when nothing is positive.
    """
    # The loss of all points costs less than picking the positive ones, which makes a GPU wait.
    predicted = torch.where(positive[..., None], predicted.float(), 1.0)
    actual = torch.where(positive[..., None], actual.float(), 1.0)
    shared = torch.minimum(predicted, actual).sum(dim=-1)
    around = torch.maximum(predicted, actual).sum(dim=-1)
    union = predicted.sum(dim=-1) + actual.sum(dim=-1) - shared
    distance = (predicted - actual).diff(dim=-1)[..., 0] / 2
    smallest = 1e-8
    overlap = shared / union.clamp(min=smallest)
    loss = 1 - overlap + (distance / around.clamp(min=smallest)).square()
    return torch.where(positive, loss, 0).sum()


def over_ranks(count: Tensor) -> tuple[Tensor, int]:
    """Sums a count over all ranks, which must all call this; returns it and their number.

    Args:
        count: of this rank.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return count, 1
    total = count.clone()
    distributed.all_reduce(total)
    return total, distributed.get_world_size()


class LossNormalizer(nn.Module):
    """A running mean of the number of a step's positive points, by which losses are divided.

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
        """Counts a step ahead of its passes, because each is divided by what all of them hold.

        Args:
            positives: scalar, the number of positive points in all of this rank's passes.
            passes: forward passes of this rank in the step.
        """
        total, ranks = over_ranks(positives.detach().float())
        self.mean.copy_(MOMENTUM * self.mean + (1 - MOMENTUM) * total.clamp(min=1))
        self._parts, self._counted = ranks * passes, passes

    def forward(self, positives: Tensor) -> Tensor:
        """Returns what to divide a pass's losses by: the mean over the passes is then the step's.

        Args:
            positives: scalar, the number of positive points of the pass: it is a step of its own
                unless `count` was called ahead.
        """
        if self.training:
            if not self._counted:
                self.count(positives, passes=1)
            self._counted -= 1
        return self.mean / self._parts


# Instances at most this much longer (grid units) than a point's shortest one share the point:
# THUMOS-14 annotates some actions twice, under two classes.
SAME_LENGTH = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Points:
    """The P time steps of all pyramid levels, level by level.

    Attributes:
        times: `(P,)` positions in feature-grid units.
        strides: `(P,)` the distance to the level's next point.
        ranges: `(P, 2)` least and greatest distance that a point may regress, grid units.
        lengths: of each level its number of points.
    """

    times: Tensor
    strides: Tensor
    ranges: Tensor
    lengths: tuple[int, ...]


def make_points(length: int, ranges: Sequence[tuple[float, float]], device: torch.device) -> Points:
    """The points of a pyramid of stride 2 over `length` features, one level for each range.

    Level l has a point at each multiple of 2^l.
    """
    lengths = tuple(length >> level for level in range(len(ranges)))
    count = torch.tensor(lengths, device=device)
    strides = 2 ** torch.arange(len(ranges), device=device)
    times = [torch.arange(n, device=device) * 2**level for level, n in enumerate(lengths)]
    return Points(
        times=torch.cat(times).float(),
        strides=strides.float().repeat_interleave(count, output_size=sum(lengths)),
        ranges=torch.tensor(ranges, device=device).repeat_interleave(
            count, dim=0, output_size=sum(lengths)
        ),
        lengths=lengths,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PointTargets:
    """What each point has to predict.

    Attributes:
        classes: `(B, P, K)` float32, one for each class that the point is a positive of.
        offsets: `(B, P, 2)` distances to the start and the end of its action, in strides; they
            mean something at positive points only.
    """

    classes: Tensor
    offsets: Tensor


@torch.no_grad()
def assign(
    points: Points,
    targets: Sequence[Targets],
    num_classes: int,
    *,
    radius: float,
    shortest_only: bool = True,
) -> PointTargets:
    """Gives each point the action that it has to find (Zhang et al., ECCV 2022, section 3.3).

    A point is positive for an instance when it lies inside it, within `radius` strides of its
    centre, and its greater distance to the instance's two ends lies in its level's range. Of
    several instances it takes the shortest, of equally short ones the classes of all and the
    offsets of the first.

    Args:
        points: P points.
        targets: of B samples the instances.
        num_classes: K.
        radius: of the centre sampling, in strides of the point's level.
        shortest_only: false to give a point the classes of all instances that it is positive for,
            and still the offsets of the shortest.

    Raises:
        ValueError: If a label is not one of the K.
    """
    device = points.times.device
    segments, labels = pad_targets(targets, num_classes, device)
    start, end = segments[:, None, :, 0], segments[:, None, :, 1]  # (B, 1, N)
    time = points.times[None, :, None]
    reach = radius * points.strides[None, :, None]
    centre = (start + end) / 2
    left, right = time - start, end - time  # (B, P, N)
    from_left = time - torch.maximum(start, centre - reach)
    from_right = torch.minimum(end, centre + reach) - time
    farthest = torch.maximum(left, right)
    least, most = points.ranges[None, :, None, 0], points.ranges[None, :, None, 1]
    candidate = (
        (torch.minimum(from_left, from_right) > 0)
        & (farthest >= least)
        & (farthest <= most)
        & (labels >= 0)[:, None]
    )
    length = torch.where(candidate, end - start, torch.inf)
    shortest, chosen = length.min(dim=2, keepdim=True)  # of equals the first
    shared = candidate & (length <= shortest + SAME_LENGTH) if shortest_only else candidate
    # Padding has no class: its row of the one-hot matrix is never selected.
    one_hot = F.one_hot(labels.clamp(min=0), num_classes).to(start.dtype)
    offsets = torch.cat([left.gather(2, chosen), right.gather(2, chosen)], dim=2)
    return PointTargets(
        classes=(shared.to(start.dtype) @ one_hot).clamp(max=1.0),
        offsets=offsets / points.strides[None, :, None],
    )


def pad_targets(
    targets: Sequence[Targets], num_classes: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The targets of a batch as tensors.

    Args:
        targets: of B samples the instances.
        num_classes: K.
        device: where the tensors go.

    Returns:
        Segments `(B, N, 2)` float32 and labels `(B, N)`, -1 where padded; N is at least one.

    Raises:
        ValueError: If a label is not one of the K.
    """
    for target in targets:
        wrong = target.labels[(target.labels < 0) | (target.labels >= num_classes)]
        if len(wrong):
            raise ValueError(
                f"A target has label {int(wrong[0])}, but the localizer was built for "
                f"{num_classes} classes (0 to {num_classes - 1})."
            )
    nothing = torch.zeros(1, 2, device=device), torch.full((1,), -1, device=device)
    segments = [target.segments.to(device, torch.float32) for target in targets]
    labels = [target.labels.to(device) for target in targets]
    padded_segments = pad_sequence([*segments, nothing[0]], batch_first=True)
    padded_labels = pad_sequence([*labels, nothing[1]], batch_first=True, padding_value=-1)
    return padded_segments[:-1], padded_labels[:-1]
