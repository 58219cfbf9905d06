"""Parts of the anchor-free localizers ActionFormer and TriDet.

Both predict a class and the distances to an action's two ends at every point of a pyramid. They
share settings, points and ranges of the levels, targets, the count of positives, and decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from re2tal.detection.segments import Detections
from re2tal.errors import check_within
from re2tal.localizers.layers import ConvHead
from re2tal.localizers.losses import LossNormalizer
from re2tal.localizers.protocol import Instances, Targets, best

# Initial probability of classes without training data.
EMPTY_PRIOR = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class PointConfig:
    """Settings of both localizers; the defaults are those published for THUMOS-14.

    Attributes:
        width: channels of the pyramid, a multiple of the number of attention heads or norm groups.
        embed_layers: convolutions that project the features.
        stem_layers: layers at full rate, 0 for none.
        levels: levels of the pyramid, each at half the rate of the one before.
        positions: length of the table of absolute position encodings; 0 for none.
        residual_scale: initial factor of the residual branches.
        drop_path: probability of dropping a residual branch in training.
        head_width: channels of the heads.
        head_layers: convolutions of each head, the last one included.
        first_range: greatest distance that level 0 regresses, in feature-grid units. Each level
            begins where the one below ends and reaches twice as far; the top level has no bound.
        overlapping_ranges: begin each level at half of where the one below ends, so that most
            actions have positives on two levels.
        centre_radius: greatest distance of a positive point from its instance's centre, in strides.
        prior: initial probability that a point belongs to a class.
        empty_classes: labels without training data; their initial probability is `EMPTY_PRIOR`.
        label_smoothing: share of the classification targets that is spread over all classes.
        regression_weight: factor of the regression loss.
        initial_normalizer: start of the running mean of positive points.
        score_threshold: detections must exceed this score.
        top_k: greatest number of detections of a level, the best first.
        min_duration: detections must be longer than this, in feature-grid units.
    """

    width: int = 512
    embed_layers: int = 2
    stem_layers: int = 2
    levels: int = 6
    positions: int = 0
    residual_scale: float = 1e-4
    drop_path: float = 0.1
    head_width: int = 512
    head_layers: int = 3
    first_range: float = 4.0
    overlapping_ranges: bool = False
    centre_radius: float = 1.5
    prior: float = 0.01
    empty_classes: tuple[int, ...] = ()
    label_smoothing: float = 0.0
    regression_weight: float = 1.0
    initial_normalizer: float = 100.0
    score_threshold: float = 0.001
    top_k: int = 2000
    min_duration: float = 0.05

    def __post_init__(self) -> None:
        check_within(
            self,
            width=(1, 2**16),
            embed_layers=(0, 64),
            stem_layers=(0, 512),
            levels=(1, 16),
            positions=(0, 2**17),
            residual_scale=(0, 1e6),
            drop_path=(0, 1),
            head_width=(1, 2**16),
            head_layers=(1, 64),
            first_range=(0, 1e6),
            centre_radius=(0, 1e6),
            prior=(0, 1),
            label_smoothing=(0, 1),
            regression_weight=(0, 1e6),
            initial_normalizer=(0, 1e9),
            score_threshold=(-1, 1),
            top_k=(1, 10**7),
            min_duration=(-1e6, 1e6),
        )

    @property
    def multiple(self) -> int:
        """Divisor of the number of features: each level above the first halves it."""
        multiple: int = 2 ** (self.levels - 1)
        return multiple

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """Least and greatest distance that each level regresses, in feature-grid units."""
        most = [*(self.first_range * 2**level for level in range(self.levels - 1)), math.inf]
        share = 0.5 if self.overlapping_ranges else 1.0
        return tuple(zip([0.0, *(share * bound for bound in most[:-1])], most, strict=True))


@torch.no_grad()
def start_scores(head: ConvHead, prior: float, empty_classes: tuple[int, ...]) -> None:
    """Set the bias of a head's last layer to a prior probability, next to zero for empty classes.

    Positive points are rare. From probabilities of 0.5, the loss of the negatives would dominate
    early training (Lin et al., ICCV 2017, section 3.3).

    Raises:
        ValueError: an empty class is not one of the head's.
    """
    assert head.last.bias is not None
    classes = len(head.last.bias)
    if any(not 0 <= label < classes for label in empty_classes):
        raise ValueError(
            f"The empty classes {empty_classes} are not all among the {classes} classes "
            f"(0 to {classes - 1}) that the localizer is built for."
        )
    probability = torch.full((classes,), prior, dtype=torch.float64)
    probability[list(empty_classes)] = EMPTY_PRIOR
    head.last.bias.copy_(probability.logit())  # so that sigmoid(bias) is the prior


@dataclass(frozen=True, kw_only=True, slots=True)
class Points:
    """Time steps of all pyramid levels, P of them, level by level.

    Attributes:
        times: `(P,)` positions in feature-grid units.
        strides: `(P,)` distances to the level's next point.
        ranges: `(P, 2)` least and greatest distances that a point may regress, in grid units.
        lengths: number of points of each level.
    """

    times: Tensor
    strides: Tensor
    ranges: Tensor
    lengths: tuple[int, ...]


Predicted: TypeAlias = tuple[Tensor, Tensor, Tensor, Points]
"""Result of `predict`, and arguments of `decode`: logits, offsets, valid points and points."""


def make_points(length: int, ranges: Sequence[tuple[float, float]], device: torch.device) -> Points:
    """Lay out the points of a pyramid over `length` features, one level for each range.

    Level l has a point at each multiple of 2^l.
    """
    lengths = tuple(length >> level for level in range(len(ranges)))
    count = torch.tensor(lengths, device=device)
    strides = 2 ** torch.arange(len(ranges), device=device)
    times = [torch.arange(n, device=device) * 2**level for level, n in enumerate(lengths)]
    # With `output_size`, `repeat_interleave` does not wait for the GPU to learn its length.
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
    """Target classes and offsets of the points.

    Attributes:
        classes: `(B, P, K)` float32, 1 for each class for which the point is positive.
        offsets: `(B, P, 2)` distances to the start and the end of the point's action, in strides;
            meaningless at points that are not positive.
    """

    classes: Tensor
    offsets: Tensor


# An instance at most this much longer (grid units) than the shortest one at a point shares the
# point: THUMOS-14 annotates some actions twice, under two classes.
SAME_LENGTH = 1e-3


@torch.no_grad()
def assign(
    points: Points,
    targets: Sequence[Targets],
    num_classes: int,
    *,
    radius: float,
    shortest_only: bool = True,
) -> PointTargets:
    """Assign an action to each point (Zhang et al., ECCV 2022, section 3.3).

    A point is positive for an instance under three conditions: it lies inside the instance, it
    lies within `radius` strides of the instance's centre, and the greater of its distances to the
    two ends is in the range of the point's level. Of several instances the point gets the shortest;
    of equally short ones, the classes of all and the offsets of the first.

    Args:
        points: P points.
        targets: instances of B windows.
        num_classes: number of classes K.
        radius: radius of the centre sampling, in strides of the point's level.
        shortest_only: if false, a point gets the classes of all instances for which it is
            positive; its offsets are still those of the shortest.

    Raises:
        ValueError: if a label is not one of the K.
    """
    device = points.times.device
    instances = Instances.of(targets, num_classes, device)
    labels = instances.labels
    start, end = instances.segments[:, None].unbind(dim=-1)  # (B, 1, N)
    time = points.times[None, :, None]
    reach = radius * points.strides[None, :, None]
    centre = (start + end) / 2
    left, right = time - start, end - time  # (B, P, N)
    # Distances to the ends of the sampled part: `reach` around the centre, clipped to the instance.
    # Both are positive exactly for points inside that part.
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
    shortest, chosen = length.min(dim=2, keepdim=True)  # the first one on ties
    shared = candidate & (length <= shortest + SAME_LENGTH) if shortest_only else candidate
    # The label -1 of padding becomes 0 here, but padded instances are never candidates.
    one_hot = F.one_hot(labels.clamp(min=0), num_classes).to(start.dtype)
    offsets = torch.cat([left.gather(2, chosen), right.gather(2, chosen)], dim=2)
    return PointTargets(
        # (B, P, N) @ (B, N, K); the clamp is for several instances of one class.
        classes=(shared.to(start.dtype) @ one_hot).clamp(max=1.0),
        offsets=offsets / points.strides[None, :, None],
    )


def count_positives(
    normalizer: LossNormalizer,
    config: PointConfig,
    masks: Sequence[Tensor],
    targets: Sequence[Sequence[Targets]],
    assigned: Callable[[Points, Sequence[Targets]], PointTargets],
) -> None:
    """Count the positive points of all passes of a step in advance; see `Localizer.begin_step`.

    Args:
        normalizer: receives the count.
        config: settings.
        masks: masks of each pass, `(B, T)` bool.
        targets: targets of each pass.
        assigned: assignment of targets to points.
    """
    positives = torch.zeros((), device=normalizer.mean.device)
    for mask, of_pass in zip(masks, targets, strict=True):
        points = make_points(mask.shape[1], config.ranges, mask.device)
        valid = torch.cat([mask[:, :: 2**level] for level in range(config.levels)], dim=1)
        positives += (valid & (assigned(points, of_pass).classes > 0).any(dim=2)).sum()
    normalizer.count(positives, passes=len(masks))


@torch.no_grad()
def decode(
    config: PointConfig, logits: Tensor, offsets: Tensor, valid: Tensor, points: Points
) -> list[Detections]:
    """Decode the detections of each sample, level by level, by falling score within a level.

    Args:
        config: settings.
        logits: logits of the classes, `(B, P, K)`.
        offsets: distances to start and end in strides, `(B, P, 2)`, or `(B, P, K, 2)` for each
            class.
        valid: `(B, P)` bool, false on padding.
        points: P points.
    """
    lengths = list(points.lengths)
    scores = torch.where(valid[..., None], logits.sigmoid(), 0)
    column = (-1, *[1] * (offsets.dim() - 3))  # (P,), or (P, 1) when offsets have a class axis
    times = points.times.view(column)
    distances = offsets * points.strides.view(column)[..., None]
    segments = torch.stack([times - distances[..., 0], times + distances[..., 1]], dim=-1)

    def of_level(scores: Tensor, segments: Tensor) -> Detections:
        found = best(scores, segments, scores > config.score_threshold, most=config.top_k)
        return found[found.segments[:, 1] - found.segments[:, 0] > config.min_duration]

    return [
        Detections.concat(
            [
                of_level(*level)
                for level in zip(
                    sample_scores.split(lengths), sample_segments.split(lengths), strict=True
                )
            ]
        )
        for sample_scores, sample_segments in zip(scores, segments, strict=True)
    ]
