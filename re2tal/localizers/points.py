"""The points of a feature pyramid, and which action each of them has to find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from re2tal.localizers.protocol import Targets

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
