"""Boundary adjustment: a second look at the features around a segment's start and end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.detection.segments import tiou
from re2tal.localizers.losses import over_ranks
from re2tal.localizers.vsgn.graph import rows, zero_padding

# How far before and behind a boundary the features are looked at: this share of the length.
REACH = 1 / 8


def inside_window(segments: Tensor, length: int) -> Tensor:
    """`segments` `(..., 2)` with boundaries clamped to a window of `length` features.

    A segment that lies outside keeps the window's first or last feature.
    """
    start, end = segments.unbind(dim=-1)
    return torch.stack([start.clamp(-0.5, length - 1.5), end.clamp(0.5, length - 0.5)], dim=-1)


def first_and_last(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first and the last feature inside `segments` `(..., 2)` sit, not rounded."""
    return segments[..., 0] + 0.5, segments[..., 1] - 0.5


class Shift(nn.Module):
    """How far one boundary moves, from the features of three nodes around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.taps = nn.Conv1d(channels, channels, 3)
        self.last = nn.Conv1d(channels, 1, 1)

    def forward(self, nodes: Tensor, before: Tensor, at: Tensor, behind: Tensor) -> Tensor:
        """Predicts from `nodes` `(B, N, C)` and indices `(B, A)` of them: `(B, A)` float32."""
        # Every tap is applied to the N nodes, in place of the 3 A that are looked at.
        weight = self.taps.weight.permute(2, 0, 1).flatten(0, 1)
        left, centre, right = F.linear(nodes, weight).chunk(3, dim=2)
        assert self.taps.bias is not None
        hidden = rows(left, before) + rows(centre, at) + rows(right, behind) + self.taps.bias
        shift: Tensor = self.last(F.relu(hidden).transpose(1, 2))
        return shift[:, 0].float()


class BoundaryAdjustment(nn.Module):
    """Moves starts and ends (Zhao et al., ICCV 2021, section 3.4).

    Args:
        channels: of the pyramid's finest level.
        stride: of its nodes, in features.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.start = Shift(channels)
        self.end = Shift(channels)

    def forward(self, segments: Tensor, finest: Tensor) -> Tensor:
        """Adjusts.

        Args:
            segments: `(B, A, 2)` in feature-grid units. Gradients pass through to them.
            finest: `(B, C, N)`, the finest level.

        Returns:
            `(B, A, 2)`; an end may come before its start.
        """
        nodes = finest.transpose(1, 2)
        clamped = inside_window(segments.detach(), finest.shape[2] * self.stride)
        reach = REACH * (clamped[..., 1] - clamped[..., 0])
        shifts = []
        for module, position in zip((self.start, self.end), first_and_last(clamped), strict=True):
            around = (position - reach, position, position + reach)
            shifts.append(module(nodes, *(self._node(p, finest.shape[2]) for p in around)))
        return segments + torch.stack(shifts, dim=-1)

    def _node(self, position: Tensor, count: int) -> Tensor:
        """Which of `count` nodes has the feature at `position` in its cell."""
        return (position / self.stride).floor().long().clamp(0, count - 1)


class MaskedGroupNorm(nn.GroupNorm):
    """Group normalisation whose statistics leave padding out; its results there are zero."""

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """`x` `(B, C, N)`, `valid` `(B, N)` bool to float32 of the same shape."""
        groups = x.float().unflatten(1, (self.num_groups, -1))  # (B, G, C / G, N)
        inside = valid[:, None, None].to(groups.dtype)
        count = (inside.sum(dim=3, keepdim=True) * groups.shape[2]).clamp(min=1)
        mean = (groups * inside).sum(dim=(2, 3), keepdim=True) / count
        centred = (groups - mean) * inside
        variance = centred.square().sum(dim=(2, 3), keepdim=True) / count
        normed = (centred * (variance + self.eps).rsqrt()).flatten(1, 2)
        return zero_padding(normed * self.weight[:, None] + self.bias[:, None], valid)


class Head(nn.Module):
    """`layers` convolutions with group norm and ReLU, and one that predicts.

    Args:
        width: channels of the features and of the layers.
        per_anchor: numbers that are predicted for an anchor.
        anchors: of a node.
        layers: convolutions before the last.
        groups: of the group norm.
    """

    def __init__(
        self, width: int, per_anchor: int, *, anchors: int, layers: int, groups: int
    ) -> None:
        super().__init__()
        self.per_anchor = per_anchor
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(layers))
        self.norms = nn.ModuleList(MaskedGroupNorm(groups, width) for _ in range(layers))
        self.last = nn.Conv1d(width, anchors * per_anchor, 3, padding=1)

    def forward(self, levels: Sequence[Tensor], valid: Sequence[Tensor]) -> Tensor:
        """Predicts for the A anchors of all levels, in the order of `make_anchors`.

        Args:
            levels: of each level features `(B, width, N)`, zero where padded.
            valid: of each level `(B, N)` bool.

        Returns:
            `(B, A, per_anchor)` float32.
        """
        predicted = torch.cat(
            [self._level(x, inside) for x, inside in zip(levels, valid, strict=True)], dim=2
        )
        return predicted.float().transpose(1, 2).unflatten(2, (-1, self.per_anchor)).flatten(1, 2)

    def _level(self, x: Tensor, valid: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x), valid))
        predicted: Tensor = self.last(x)
        return predicted


@dataclass(frozen=True, kw_only=True, slots=True)
class Instances:
    """The actions of B samples, at most N each.

    Attributes:
        segments: `(B, N, 2)` float32 in feature-grid units.
        labels: `(B, N)` int64, -1 where a sample has fewer; the segment there is an instant, which
            overlaps nothing.
    """

    segments: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Matches:
    """What each of A segments has to become.

    Attributes:
        classes: `(B, A)` int64, 0 for the background and 1 + the action's label.
        segments: `(B, A, 2)` those of the actions; they mean something at positives only.
    """

    classes: Tensor
    segments: Tensor

    @property
    def positive(self) -> Tensor:
        """`(B, A)` bool, which have an action."""
        return self.classes > 0


@torch.no_grad()
def match(segments: Tensor, valid: Tensor, instances: Instances, threshold: float) -> Matches:
    """Gives segments the action that they overlap most (Zhao et al., ICCV 2021, section 3.4).

    A segment is positive when the overlap reaches `threshold`, or when no segment overlaps some
    action more than it does: so every action that anything overlaps is trained on. Such a segment
    still gets the action that it itself overlaps most.

    The overlap is the plain tIoU. An action that nothing overlaps has no positives.

    Args:
        segments: `(B, A, 2)`.
        valid: `(B, A)` bool; others are never positive.
        instances: the actions.
        threshold: tIoU.
    """
    overlap = tiou(segments[:, :, None], instances.segments[:, None])  # (B, A, N)
    overlap = torch.where(valid[:, :, None], overlap, 0)
    best, chosen = overlap.max(dim=2)
    unsurpassed = (overlap == overlap.amax(dim=1, keepdim=True)).logical_and(overlap > 0)
    positive = (best >= threshold) | unsurpassed.any(dim=2)
    classes = instances.labels.gather(1, chosen) + 1
    return Matches(
        classes=torch.where(positive, classes, 0),
        segments=instances.segments.gather(1, chosen[..., None].expand(-1, -1, 2)),
    )


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


# The order of the scores in every tensor.
SCORES = ("start", "end", "action")
# Width of the region around a start or an end that counts as such, in features.
REGION = 3.0


class ScoreHead(nn.Module):
    """The logit of one score for each node of the pyramid's finest level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.last = nn.Conv1d(channels, 1, 1)

    def forward(self, finest: Tensor) -> Tensor:
        """`(B, C, N)` to `(B, 1, N)` float32."""
        logits: Tensor = self.last(F.relu(self.conv(finest)))
        return logits.float()


class SupplementaryScores(nn.Module):
    """The three scores (Zhao et al., ICCV 2021, section 3.4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: ScoreHead(channels) for name in SCORES})

    def forward(self, finest: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Scores `length` features from the finest level `(B, C, N)`.

        Returns:
            `(B, 3, T)` float32 each: the logarithm of each score, and of one minus it.
        """
        logits = torch.cat([head(finest) for head in self.heads.values()], dim=1)
        return (
            log_interpolated(F.logsigmoid(logits), length),
            log_interpolated(F.logsigmoid(-logits), length),
        )


def log_interpolated(logs: Tensor, length: int) -> Tensor:
    """The logarithm of the linear interpolation of `exp(logs)`.

    Scores are interpolated, not their logits, but the loss of a score next to 0 or 1 needs its
    logarithm to full precision. The first and the last value stay where they are.

    Args:
        logs: `(..., N)`.
        length: T.

    Returns:
        `(..., T)`.
    """
    count = logs.shape[-1]
    position = torch.linspace(0, count - 1, length, device=logs.device)
    before = position.long().clamp(max=max(count - 2, 0))
    behind = (before + 1).clamp(max=count - 1)
    share = position - before
    return torch.logaddexp(logs[..., before] + (1 - share).log(), logs[..., behind] + share.log())


@torch.no_grad()
def score_targets(instances: Instances, length: int) -> Tensor:
    """At which features actions start, end or go on: `(B, 3, T)` bool.

    An action starts or ends at the features of whose cell, half a unit to either side, more than
    half lies in a region of three features around the boundary (Lin et al., ECCV 2018, section
    3.3): those less than half the region's width away. It goes on at those of whose cell more than
    half lies inside the action.
    """
    feature = torch.arange(length, device=instances.labels.device)[None, :, None]
    start, end = instances.segments[:, None].unbind(dim=-1)  # (B, 1, N)
    inside = torch.minimum(feature + 0.5, end) - torch.maximum(feature - 0.5, start)
    is_at = torch.stack(
        [(feature - start).abs() < REGION / 2, (feature - end).abs() < REGION / 2, inside > 0.5],
        dim=1,
    )
    return (is_at & (instances.labels >= 0)[:, None, None]).any(dim=3)


def score_losses(
    yes: Tensor, no: Tensor, targets: Tensor, mask: Tensor, *, all_ranks: bool = False
) -> dict[str, Tensor]:
    """Balanced binary log loss of each score (Lin et al., ECCV 2018, equation 3).

    It weighs positives and negatives so that both count the same: half the mean of each.

    Args:
        yes: `(B, 3, T)` logarithms of the scores.
        no: `(B, 3, T)` logarithms of one minus the scores.
        targets: `(B, 3, T)` bool.
        mask: `(B, T)` bool, which features count.
        all_ranks: as `mean_over`.
    """
    losses = {}
    for i, name in enumerate(SCORES):
        positive, negative = mask & targets[:, i], mask & ~targets[:, i]
        of_positives = mean_over(-yes[:, i], positive, all_ranks=all_ranks)
        of_negatives = mean_over(-no[:, i], negative, all_ranks=all_ranks)
        losses[name] = (of_positives + of_negatives) / 2
    return losses


def boundary_scores(yes: Tensor, segments: Tensor) -> Tensor:
    """Start score times end score of segments that lie inside the window.

    Each is the mean over the two features next to where the first, or last, one inside would be.

    Args:
        yes: `(B, 3, T)` logarithms of the scores.
        segments: `(B, A, 2)` in feature-grid units.

    Returns:
        `(B, A)`.
    """
    means = []
    for score, place in zip(yes.exp().unbind(dim=1), first_and_last(segments), strict=False):
        below, above = place.floor().long(), place.ceil().long()
        means.append((score.gather(1, below) + score.gather(1, above)) / 2)
    return means[0] * means[1]


# What the network predicts is the shift of the centre in tenths of the anchor's length and five
# times the logarithm of how much longer it gets, at most this much.
SHIFT_SCALE = 10.0
GROWTH_SCALE = 5.0
GREATEST_GROWTH = math.log(1000 / 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchors:
    """The A anchors of all levels: level by level, node by node, scale by scale.

    Attributes:
        centres: `(A,)` in feature-grid units; whole numbers.
        lengths: `(A,)` in feature-grid units.
    """

    centres: Tensor
    lengths: Tensor

    @property
    def segments(self) -> Tensor:
        """`(A, 2)` starts and ends."""
        return torch.stack(
            [self.centres - self.lengths / 2, self.centres + self.lengths / 2], dim=1
        )

    def decode(self, regression: Tensor) -> Tensor:
        """Segments in feature-grid units for predictions.

        The centre moves by a tenth of the anchor's length times the first number, the length is
        multiplied by the exponential of a fifth of the second.

        Args:
            regression: `(B, A, 2)` float32.

        Returns:
            `(B, A, 2)` starts and ends, every one of them of positive length.
        """
        centre = self.centres + regression[..., 0] / SHIFT_SCALE * self.lengths
        growth = (regression[..., 1] / GROWTH_SCALE).clamp(max=GREATEST_GROWTH)
        half = growth.exp() * self.lengths / 2
        return torch.stack([centre - half, centre + half], dim=-1)


def make_anchors(
    length: int, strides: Sequence[int], scales: Sequence[float], device: torch.device
) -> Anchors:
    """The anchors over `length` features.

    A node of stride s has anchors of length s times each scale. Their centre is at k s + s / 2 for
    the level's k-th node: half a feature behind the middle of its cell, as in the authors' release.
    """
    centres, lengths = [], []
    for stride in strides:
        node = torch.arange(length // stride, device=device) * stride + stride / 2
        centres.append(node.repeat_interleave(len(scales)))
        lengths.append(stride * torch.tensor(scales, device=device).repeat(length // stride))
    return Anchors(centres=torch.cat(centres), lengths=torch.cat(lengths))


def anchors_of_nodes(levels: Sequence[Tensor], scales: int) -> Tensor:
    """What holds for an anchor because it holds for its node.

    Args:
        levels: of each level `(B, N)`.
        scales: anchors of a node.

    Returns:
        `(B, A)` in the order of `make_anchors`.
    """
    return torch.cat(list(levels), dim=1).repeat_interleave(scales, dim=1)
