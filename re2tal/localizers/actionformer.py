"""ActionFormer: localizing moments of actions with transformers (Zhang, Wu, Li, ECCV 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.detection.segments import Detections
from re2tal.errors import check_within
from re2tal.localizers.losses import LossNormalizer, diou_loss, focal_loss
from re2tal.localizers.protocol import Instances, Losses, Targets, best
from re2tal.localizers.transformer import (
    ConvHead,
    Embedding,
    HalvingPyramid,
    LevelScale,
    Strip,
    TransformerBlock,
)
from re2tal.localizers.weights import Published, renamed

# Initial probability of classes that have no training data.
EMPTY_PRIOR = 1e-6

# From our names of weights to those of the authors' release; each rule changes another part.
_RENAMED = (
    (r"^pyramid\.embed\.streams\.(\d+)\.", r"backbone.proj.\1.conv."),
    (r"^pyramid\.embed\.convs\.(\d+)\.", r"backbone.embd.\1.conv."),
    (r"^pyramid\.embed\.norms\.", "backbone.embd_norm."),
    (r"^pyramid\.(stem|branch)\.", r"backbone.\1."),
    (r"^pyramid\.norms\.", "neck.fpn_norms."),
    (r"\.(query|key|value)_conv\.", r".\1_conv.conv."),
    (r"\.scale_(attn|mlp)\.", r".drop_path_\1."),
    (r"^class_head\.last\.", "cls_head.cls_head.conv."),
    (r"^class_head\.norms\.", "cls_head.norm."),
    (r"^class_head\.convs\.(\d+)\.", r"cls_head.head.\1.conv."),
    (r"^offset_head\.last\.", "reg_head.offset_head.conv."),
    (r"^offset_head\.norms\.", "reg_head.norm."),
    (r"^offset_head\.convs\.(\d+)\.", r"reg_head.head.\1.conv."),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionFormerConfig:
    """ActionFormer's settings; the defaults are those published for THUMOS-14.

    Attributes:
        width: channels of the transformer and of the pyramid, a multiple of `heads`.
        streams: channels and share of `width` of each kind of features, where several kinds stand
            side by side, each of which is first projected by itself; empty for one kind.
        embed_layers: convolutions that project the features; 0 only with `streams`.
        stem_layers: transformer blocks at full rate, 0 for none.
        levels: levels of the pyramid, each at half the rate of the one before.
        window: width of the local attention, odd; one for all levels or one a level; 0 is global.
        heads: heads of the attention.
        positions: length of the table of absolute position encodings; 0 for none.
        residual_scale: initial factor of the residual branches.
        input_dropout: share of the features' channels left out in training.
        dropout: share of the values left out in the transformer's MLPs and after its attention.
        drop_path: share of residual branches left out in training.
        head_width: channels of the two heads.
        head_layers: convolutions of each head, the last one included.
        first_range: greatest distance that level 0 regresses, in feature-grid units; each level
            takes over where the last ends and doubles it, the top level has no bound.
        overlapping_ranges: let each level take over at half of where the last ends, so that most
            actions have positives on two levels.
        centre_radius: greatest distance of a positive point from its instance's centre, in strides.
        shortest_only: a point that fits several instances has the classes of the shortest only;
            otherwise those of all.
        prior: initial probability that a point belongs to a class.
        empty_classes: labels without training data, which start out next to impossible.
        label_smoothing: share of the classification targets that is spread over all classes.
        regression_weight: factor of the regression loss.
        initial_normalizer: start of the running mean of positive points.
        score_threshold: score that detections must exceed.
        top_k: detections that a level passes on at most, the best first.
        min_duration: length that detections must exceed, in feature-grid units.
    """

    width: int = 512
    streams: tuple[tuple[int, int], ...] = ()
    embed_layers: int = 2
    stem_layers: int = 2
    levels: int = 6
    window: int | tuple[int, ...] = 19
    heads: int = 4
    positions: int = 0
    residual_scale: float = 1e-4
    input_dropout: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.1
    head_width: int = 512
    head_layers: int = 3
    first_range: float = 4.0
    overlapping_ranges: bool = False
    centre_radius: float = 1.5
    shortest_only: bool = True
    prior: float = 0.01
    empty_classes: tuple[int, ...] = ()
    label_smoothing: float = 0.0
    regression_weight: float = 1.0
    initial_normalizer: float = 100.0
    score_threshold: float = 0.001
    top_k: int = 2000
    min_duration: float = 0.05

    def __post_init__(self) -> None:
        # Without streams nothing but these convolutions brings features to the width.
        embed = 0 if self.streams else 1
        check_within(
            self,
            width=(1, 2**16),
            embed_layers=(embed, 64),
            stem_layers=(0, 512),
            levels=(1, 16),
            window=(0, 2**16),
            heads=(1, 2**10),
            positions=(0, 2**17),
            residual_scale=(0, 1e6),
            input_dropout=(0, 1),
            dropout=(0, 1),
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
        if self.width % self.heads:
            raise ValueError(f"A width of {self.width} cannot be cut into {self.heads} heads.")
        if self.streams and sum(width for _, width in self.streams) != self.width:
            raise ValueError(
                f"The streams {self.streams} have shares of "
                f"{sum(width for _, width in self.streams)} channels, but the width is "
                f"{self.width}: make the second numbers add up to it."
            )
        if len(self.windows) != self.levels:
            raise ValueError(
                f"{len(self.windows)} attention windows were given for {self.levels} levels: "
                "give one for each level, or one number for all."
            )
        if any(window != 0 and window % 2 == 0 for window in self.windows):
            raise ValueError(f"Attention windows must be odd or 0 (global): {self.windows}.")

    @property
    def multiple(self) -> int:
        """Number of which the number of features is a multiple: each level halves it."""
        multiple: int = 2 ** (self.levels - 1)
        return multiple

    @property
    def windows(self) -> tuple[int, ...]:
        """Width of the attention at each level."""
        return (self.window,) * self.levels if isinstance(self.window, int) else self.window

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """Least and greatest distance that each level regresses, in feature-grid units."""
        return level_ranges(self.levels, self.first_range, overlapping=self.overlapping_ranges)

    def build(self, in_channels: int, num_classes: int) -> ActionFormer:
        """Build an ActionFormer for `in_channels` channels and `num_classes` classes."""
        return ActionFormer(self, in_channels, num_classes)


class ActionFormer(nn.Module):
    """Localizer that classifies every point of a feature pyramid and regresses its action's ends.

    A `re2tal.localizers.Localizer`. Losses are "classification" (focal) and "regression"
    (distance-IoU of the positive points, times `regression_weight`), both divided by a running
    mean of the number of positive points.

    It computes what the authors' implementation does, except that windows without a valid step
    stay finite under global attention, that the top level regresses any distance (theirs up to
    10000), and that of equal scores the earlier point comes first. Features of padded steps are
    those of the published model: finite, and the same whatever the padding held. As there, the last
    steps of a video see a little of whether padding follows (it takes the biases of the layer
    norms) or the end of the tensor (zeros), so how much is padded is part of the model.

    Args:
        config: settings.
        in_channels: channels C of the features.
        num_classes: number of classes K.
    """

    def __init__(self, config: ActionFormerConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.multiple = config.multiple
        embed = Embedding(
            in_channels,
            config.width,
            streams=config.streams,
            layers=config.embed_layers,
            positions=config.positions,
            dropout=config.input_dropout,
        )

        def block(window: int, stride: int) -> TransformerBlock:
            return TransformerBlock(
                config.width,
                heads=config.heads,
                window=window,
                stride=stride,
                residual_scale=config.residual_scale,
                dropout=config.dropout,
                drop_path=config.drop_path,
            )

        self.pyramid = HalvingPyramid(
            embed,
            config.width,
            stem=[block(config.windows[0], 1) for _ in range(config.stem_layers)],
            branch=[block(window, 2) for window in config.windows[1:]],
        )
        width, layers = config.head_width, config.head_layers
        self.class_head = ConvHead(config.width, width, num_classes, layers=layers)
        self.offset_head = ConvHead(config.width, width, 2, layers=layers)
        self.offset_scale = LevelScale(config.levels)
        self.normalizer = LossNormalizer(config.initial_normalizer)
        start_scores(self.class_head, config.prior, config.empty_classes)

    @overload
    def forward(self, features: Tensor, mask: Tensor, targets: Sequence[Targets]) -> Losses: ...
    @overload
    def forward(self, features: Tensor, mask: Tensor, targets: None = None) -> list[Detections]: ...

    def forward(
        self, features: Tensor, mask: Tensor, targets: Sequence[Targets] | None = None
    ) -> Losses | list[Detections]:
        """Compute losses against `targets`, or detections without them; see `Localizer`.

        Args:
            features: `(B, C, T)`, T a multiple of `2 ** (levels - 1)`.
            mask: `(B, T)` bool, false on padding.
            targets: actions of each window, in feature-grid units.

        Raises:
            ValueError: if T is no such multiple, or a label is not below `num_classes`.
        """
        logits, offsets, valid, points = self.predict(features, mask)
        if targets is None:
            return decode(
                logits,
                offsets,
                valid,
                points,
                score_threshold=self.config.score_threshold,
                top_k=self.config.top_k,
                min_duration=self.config.min_duration,
            )
        actual = self._assign(points, targets)
        positive = valid & (actual.classes > 0).any(dim=2)
        count = self.normalizer(positive.sum())
        smoothing = self.config.label_smoothing
        regression = diou_loss(offsets, actual.offsets, positive)
        return {
            "classification": focal_loss(logits, actual.classes, valid, smoothing=smoothing)
            / count,
            "regression": self.config.regression_weight * regression / count,
        }

    def begin_step(self, masks: Sequence[Tensor], targets: Sequence[Sequence[Targets]]) -> None:
        """Count the positive points of a whole step, by which its losses are divided."""
        count_positives(self.normalizer, masks, targets, self.config.ranges, self._assign)

    def _assign(self, points: Points, targets: Sequence[Targets]) -> PointTargets:
        return assign(
            points,
            targets,
            self.num_classes,
            radius=self.config.centre_radius,
            shortest_only=self.config.shortest_only,
        )

    def predict(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Points]:
        """Run the network, up to the logits and distances of each point.

        Args:
            features: `(B, C, T)`.
            mask: `(B, T)` bool.

        Returns:
            Logits of the classes `(B, P, K)`, distances to start and end in strides
            `(B, P, 2)`, the mask of points that are no padding `(B, P)`, and the points.
        """
        pyramid = self.pyramid(features, mask)
        strip = Strip.lay_out(pyramid)
        points = make_points(features.shape[2], self.config.ranges, features.device)
        logits = self.class_head(strip)
        offsets = F.relu(self.offset_scale(self.offset_head(strip), points.lengths))
        return logits, offsets, strip.valid[:, strip.points], points

    def published(self) -> Published:
        """Names of the weights in the public implementation, whose function is the same.

        To get what its evaluation gets, pad each video as it does: to the length of the training's
        windows, or when it is longer to the next multiple of the largest
        `2^level * (attention window - 1)` (`2^level` where attention is global); see
        `ActionFormer`. Trained with a drop path of 0, it has no residual scales; such weights
        do not fit. It does not save the running mean of positive points.
        """
        names = {name: (renamed(name, _RENAMED),) for name in self.state_dict()}
        scales = tuple(f"reg_head.scale.{level}.scale" for level in range(self.config.levels))
        return Published(
            title="ActionFormer of its authors",
            names={**names, "offset_scale.scale": scales, "normalizer.mean": ()},
            left_out=("point_generator.", "backbone.pos_embd"),
        )


def level_ranges(
    levels: int, first: float, *, overlapping: bool
) -> tuple[tuple[float, float], ...]:
    """Lay out least and greatest distance that each level regresses, in feature-grid units.

    Args:
        levels: levels of the pyramid.
        first: greatest distance of level 0; each further level doubles it, the top has no bound.
        overlapping: let each level take over at half of where the last ends.
    """
    most = [*(first * 2**level for level in range(levels - 1)), math.inf]
    share = 0.5 if overlapping else 1.0
    return tuple(zip([0.0, *(share * bound for bound in most[:-1])], most, strict=True))


@torch.no_grad()
def start_scores(head: ConvHead, prior: float, empty_classes: tuple[int, ...]) -> None:
    """Start a head's scores at a prior probability, and those of empty classes next to zero.

    So rare are positive points that a network which starts undecided would at first learn nothing
    else (Lin et al., ICCV 2017, section 3.3).

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
    head.last.bias.copy_(probability.logit())


@dataclass(frozen=True, kw_only=True, slots=True)
class Points:
    """The P time steps of all pyramid levels, level by level.

    Attributes:
        times: `(P,)` positions in feature-grid units.
        strides: `(P,)` distances to the level's next point.
        ranges: `(P, 2)` least and greatest distances that a point may regress, grid units.
        lengths: number of points of each level.
    """

    times: Tensor
    strides: Tensor
    ranges: Tensor
    lengths: tuple[int, ...]


def make_points(length: int, ranges: Sequence[tuple[float, float]], device: torch.device) -> Points:
    """Lay out the points of a pyramid over `length` features, one level for each range.

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
    """Classes and offsets that the points have to predict.

    Attributes:
        classes: `(B, P, K)` float32, one for each class that the point is a positive of.
        offsets: `(B, P, 2)` distances to the start and the end of its action, in strides; they
            mean something at positive points only.
    """

    classes: Tensor
    offsets: Tensor


# Instances at most this much longer (grid units) than a point's shortest one share the point:
# THUMOS-14 annotates some actions twice, under two classes.
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
    """Give each point the action that it has to find (Zhang et al., ECCV 2022, section 3.3).

    A point is positive for an instance when it lies inside it, within `radius` strides of its
    centre, and its greater distance to the instance's two ends lies in its level's range. Of
    several instances it takes the shortest, of equally short ones the classes of all and the
    offsets of the first.

    Args:
        points: P points.
        targets: instances of B windows.
        num_classes: number of classes K.
        radius: radius of the centre sampling, in strides of the point's level.
        shortest_only: false to give a point the classes of all instances that it is positive for,
            and still the offsets of the shortest.

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


def count_positives(
    normalizer: LossNormalizer,
    masks: Sequence[Tensor],
    targets: Sequence[Sequence[Targets]],
    ranges: Sequence[tuple[float, float]],
    assigned: Callable[[Points, Sequence[Targets]], PointTargets],
) -> None:
    """Count the positive points of all passes of a step ahead; see `Localizer.begin_step`.

    Args:
        normalizer: normalizer that is told.
        masks: masks of each pass, `(B, T)` bool.
        targets: targets of each pass.
        ranges: distances that each level of the pyramid regresses.
        assigned: assignment of targets to points.
    """
    positives = torch.zeros((), device=normalizer.mean.device)
    for mask, of_pass in zip(masks, targets, strict=True):
        points = make_points(mask.shape[1], ranges, mask.device)
        valid = torch.cat([mask[:, :: 2**level] for level in range(len(ranges))], dim=1)
        classes = assigned(points, of_pass).classes
        positives += (valid & (classes > 0).any(dim=2)).sum()
    normalizer.count(positives, passes=len(masks))


@torch.no_grad()
def decode(
    logits: Tensor,
    offsets: Tensor,
    valid: Tensor,
    points: Points,
    *,
    score_threshold: float,
    top_k: int,
    min_duration: float,
) -> list[Detections]:
    """Decode the detections of each sample, level by level, by falling score within a level.

    Args:
        logits: logits of the classes, `(B, P, K)`.
        offsets: distances to start and end in strides, `(B, P, 2)`, or of each class
            `(B, P, K, 2)`.
        valid: `(B, P)` bool, false on padding.
        points: P points.
        score_threshold: score that detections must exceed.
        top_k: detections of a level at most.
        min_duration: length that detections must exceed, in feature-grid units.
    """
    lengths = list(points.lengths)
    scores = torch.where(valid[..., None], logits.sigmoid(), 0)
    column = (-1, *[1] * (offsets.dim() - 3))
    times = points.times.view(column)
    distances = offsets * points.strides.view(column)[..., None]
    segments = torch.stack([times - distances[..., 0], times + distances[..., 1]], dim=-1)

    def of_level(scores: Tensor, segments: Tensor) -> Detections:
        found = best(scores, segments, scores > score_threshold, most=top_k)
        return found[found.segments[:, 1] - found.segments[:, 0] > min_duration]

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
