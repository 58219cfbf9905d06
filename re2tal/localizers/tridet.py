"""TriDet: temporal action detection with relative boundary modelling (Shi et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.detection.segments import Detections
from re2tal.errors import check_within
from re2tal.localizers.layers import (
    ConvHead,
    DepthwiseConvolution,
    Embedding,
    HalvingPyramid,
    LevelScale,
    MaskedGroupNorm,
    ResidualScale,
    Strip,
    zero_padding,
)
from re2tal.localizers.losses import SMALLEST, LossNormalizer, diou_loss, focal_loss, offset_iou
from re2tal.localizers.points import (
    PointConfig,
    Points,
    PointTargets,
    assign,
    count_positives,
    decode,
    make_points,
    start_scores,
)
from re2tal.localizers.protocol import Losses, Targets
from re2tal.localizers.weights import Published, renamed

# Groups of the normalisation before each MLP.
GROUPS = 16

# From our names of weights to those of the authors' release; each rule changes another part.
_RENAMED = (
    (r"^pyramid\.embed\.convs\.(\d+)\.", r"backbone.embd.\1.conv."),
    (r"^pyramid\.embed\.norms\.", "backbone.embd_norm."),
    (r"^pyramid\.(stem|branch)\.", r"backbone.\1."),
    (r"^pyramid\.norms\.", "neck.fpn_norms."),
    (r"\.(\d+)\.norm\.", r".\1.ln."),
    (r"\.group_norm\.", ".gn."),
    (r"\.window_gate\.", ".psi."),
    (r"\.video_gate\.", ".global_fc."),
    (r"\.instant\.", ".fc."),
    (r"\.narrow\.", ".convw."),
    (r"\.wide\.", ".convkw."),
    (r"\.scale_mixed\.", ".drop_path_out."),
    (r"\.scale_mlp\.", ".drop_path_mlp."),
    (r"^(class|start|end)_head\.last\.", r"\1_head.cls_head.conv."),
    (r"^offset_head\.last\.", "offset_head.offset_head.conv."),
    (r"^(\w+_head)\.norms\.", r"\1.norm."),
    (r"^(\w+_head)\.convs\.(\d+)\.", r"\1.head.\2.conv."),
    (r"^class_head\.", "cls_head."),
    (r"^offset_head\.", "reg_head."),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TriDetConfig(PointConfig):
    """TriDet's settings; the defaults, `filter_start` aside, are those published for THUMOS-14.

    Layers at full rate have a narrow window of one step, and neither residual scales nor drop path;
    `prior` is also the probability that a point bounds an action.

    Attributes:
        window: width of SGP's narrow window in steps, odd.
        widening: SGP's wide window is this many times `window + 1` wide, made odd.
        mlp_width: hidden channels of the MLP in each SGP layer.
        filter_start: standard deviation of SGP's filters at the start. It has two branches, each a
            product of filters: from 0, which is published for THUMOS-14 and EPIC-Kitchens-100,
            neither has a gradient and both stay at zero, so that the layer is a normalisation and
            an MLP. Published are 0.1 for HACS and 0.2 for ActivityNet-1.3.
        input_noise: standard deviation of the noise on the features in training.
        bins: greatest distance of a boundary from its point, in strides; a boundary is expected
            over the `bins + 1` points on its side.
        iou_power: power of the IoU by which the classification loss of positives is weighed.
    """

    window: int = 1
    widening: float = 5.0
    mlp_width: int = 768
    filter_start: float = 0.1
    input_noise: float = 0.0005
    bins: int = 16
    iou_power: float = 0.2

    def __post_init__(self) -> None:
        PointConfig.__post_init__(self)
        check_within(
            self,
            embed_layers=(1, 64),
            window=(1, 2**10),
            widening=(0.5, 2**6),
            mlp_width=(1, 2**18),
            filter_start=(0, 1e6),
            input_noise=(0, 1e6),
            bins=(1, 2**10),
            iou_power=(0, 1e3),
        )
        if self.width % GROUPS:
            raise ValueError(
                f"A width of {self.width} cannot be cut into the {GROUPS} groups of TriDet's "
                f"normalisation: make it a multiple of {GROUPS}."
            )
        if self.window % 2 == 0:
            raise ValueError(f"TriDet's window must be odd, but is {self.window}.")

    def build(self, in_channels: int, num_classes: int) -> TriDet:
        """Build a TriDet for `in_channels` channels and `num_classes` classes."""
        return TriDet(self, in_channels, num_classes)


class TriDet(nn.Module):
    """Localizer whose points expect the two ends of an action over the points around them.

    A `re2tal.localizers.Localizer`. Losses are "classification" (focal; at positives times a power
    of the IoU that the regression reaches there) and "regression" (distance-IoU of each positive
    point and class, times `regression_weight`), both divided by a running mean of the number of
    positive points.

    On windows without padding it computes what the authors' implementation does, except that the
    top level regresses any distance (theirs up to 10000), that an IoU below 1e-8 counts as that in
    the weight of the classification, whose gradient stays finite so, and that of equal scores the
    earlier point comes first. Padding acts as the end of the tensor does: results on a padded
    window are those on the window without it. Theirs takes padding into the means of the SGP
    layers and into their normalisation. Heads have kernel 3 here (theirs 5 and 1 for HACS).

    Args:
        config: settings.
        in_channels: channels C of the features.
        num_classes: number of classes K.
    """

    def __init__(self, config: TriDetConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.multiple = config.multiple
        self.normalizer = LossNormalizer(config.initial_normalizer)
        embed = Embedding(
            in_channels,
            config.width,
            streams=(),
            layers=config.embed_layers,
            positions=config.positions,
            dropout=0.0,
            zero_padded=True,
        )
        self.pyramid = HalvingPyramid(
            embed,
            config.width,
            stem=[SGPLayer(config, halves=False) for _ in range(config.stem_layers)],
            branch=[SGPLayer(config, halves=True) for _ in range(config.levels - 1)],
        )

        def head(channels: int) -> ConvHead:
            return ConvHead(config.width, config.head_width, channels, layers=config.head_layers)

        self.class_head, self.start_head, self.end_head = (head(num_classes) for _ in range(3))
        self.offset_head = head(2 * (config.bins + 1))
        self.offset_scale = LevelScale(config.levels)
        for scores in (self.class_head, self.start_head, self.end_head):
            start_scores(scores, config.prior, config.empty_classes)

    @overload
    def forward(self, features: Tensor, mask: Tensor, targets: Sequence[Targets]) -> Losses: ...
    @overload
    def forward(self, features: Tensor, mask: Tensor, targets: None = None) -> list[Detections]: ...

    def forward(
        self, features: Tensor, mask: Tensor, targets: Sequence[Targets] | None = None
    ) -> Losses | list[Detections]:
        """Compute losses against `targets`, or detections without them; see `Localizer`.

        Raises:
            ValueError: if T is no multiple of `multiple`, or a label is not below `num_classes`.
        """
        logits, offsets, valid, points = self.predict(features, mask)
        if targets is None:
            return decode(self.config, logits, offsets, valid, points)
        actual = self._assign(points, targets)
        config = self.config
        positive = valid[..., None] & (actual.classes > 0)
        wanted = actual.offsets[:, :, None]  # the same for all classes of a point
        count = self.normalizer(positive.any(dim=2).sum())
        overlap = offset_iou(offsets, wanted, positive)  # one where not positive
        classification = focal_loss(
            logits,
            actual.classes,
            valid,
            smoothing=config.label_smoothing,
            weights=overlap.clamp(min=SMALLEST) ** config.iou_power,
        )
        regression = diou_loss(offsets, wanted, positive)
        return {
            "classification": classification / count,
            "regression": config.regression_weight * regression / count,
        }

    def begin_step(self, masks: Sequence[Tensor], targets: Sequence[Sequence[Targets]]) -> None:
        """Count the positive points of a whole step, by which its losses are divided."""
        count_positives(self.normalizer, self.config, masks, targets, self._assign)

    def _assign(self, points: Points, targets: Sequence[Targets]) -> PointTargets:
        return assign(points, targets, self.num_classes, radius=self.config.centre_radius)

    def predict(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Points]:
        """Run the network, up to the logits and distances of each point.

        Args:
            features: `(B, C, T)`.
            mask: `(B, T)` bool.

        Returns:
            Logits of the classes `(B, P, K)`, distances to start and end of each class in strides
            `(B, P, K, 2)`, the mask of points that are no padding `(B, P)`, and the points.
        """
        if self.training and self.config.input_noise:
            features = features + self.config.input_noise * torch.randn_like(features)
        strip = Strip.lay_out(self.pyramid(features, mask))
        # To the heads padding is a gap as those between the levels are.
        inner = zero_padding(strip.features, strip.valid)
        strip = replace(strip, features=inner, inside=strip.valid)
        valid = strip.valid[:, strip.points]
        points = make_points(features.shape[2], self.config.ranges, features.device)
        bins = F.relu(self.offset_scale(self.offset_head(strip), points.lengths))
        # What bounds an action does not shape the pyramid.
        alone = replace(strip, features=inner.detach())
        offsets = boundary_distances(
            zero_padding(self.start_head(alone), valid),
            zero_padding(self.end_head(alone), valid),
            bins.unflatten(2, (2, -1)),
            points.lengths,
        )
        return self.class_head(strip), offsets, valid, points

    def published(self) -> Published:
        """Names of the weights in the authors' release; see `TriDet` for what differs.

        Trained with a drop path of 0, it has no residual scales; such weights do not fit. It does
        not save the running mean of positive points.
        """
        names = {name: (renamed(name, _RENAMED),) for name in self.state_dict()}
        scales = tuple(f"reg_head.scale.{level}.scale" for level in range(self.config.levels))
        return Published(
            title="TriDet of its authors",
            names={**names, "offset_scale.scale": scales, "normalizer.mean": ()},
            left_out=("point_generator.",),
        )


class SGPLayer(nn.Module):
    """Scalable-granularity perception: depthwise filters in place of self-attention, then an MLP.

    Of the normalised features, the instant-level branch multiplies each step by what the mean of
    the whole window says, the window-level branch the sum of a narrow and a wide filter by a filter
    of the narrow width (Shi et al., CVPR 2023, eq. 1). A layer that halves takes a maximum over
    three steps first.

    Args:
        config: settings.
        halves: false for the layers at full rate, whose narrow window is one step and whose
            residual branches have neither factor nor stochastic depth.
    """

    def __init__(self, config: TriDetConfig, *, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        width, narrow = config.width, config.window if halves else 1
        wide = round((narrow + 1) * config.widening)
        wide += 1 - wide % 2
        self.norm = nn.LayerNorm(width)
        self.instant = DepthwiseConvolution(width, kernel=1, bias=True)
        self.video_gate = DepthwiseConvolution(width, kernel=1, bias=True)
        self.narrow = DepthwiseConvolution(width, kernel=narrow, bias=True)
        self.wide = DepthwiseConvolution(width, kernel=wide, bias=True)
        self.window_gate = DepthwiseConvolution(width, kernel=narrow, bias=True)
        self.scale_mixed, self.scale_mlp = (
            ResidualScale(width, initial=config.residual_scale, drop_path=config.drop_path)
            if halves
            else nn.Identity()
            for _ in range(2)
        )
        self.group_norm = MaskedGroupNorm(GROUPS, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_width), nn.GELU(), nn.Linear(config.mlp_width, width)
        )
        for module in self.modules():
            if isinstance(module, DepthwiseConvolution):
                nn.init.normal_(module.weight, std=config.filter_start)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map `x` `(B, T, C)`, zero where padded, and `mask` `(B, T)` to the same, or to half."""
        if self.halves:
            # Padding must win no maximum; a valid step that stays is in its own maximum.
            x = x.masked_fill(~mask[..., None], -torch.inf).transpose(1, 2)
            mask = mask[:, ::2]
            x = F.max_pool1d(x, 3, 2, padding=1).transpose(1, 2)
            x = x.masked_fill(~mask[..., None], 0)
        normed = zero_padding(self.norm(x), mask)
        mean = normed.sum(dim=1, keepdim=True) / mask.sum(dim=1).clamp(min=1)[:, None, None]
        instant = self.instant(normed) * F.relu(self.video_gate(mean))
        window = (self.narrow(normed) + self.wide(normed)) * self.window_gate(normed)
        x = x + self.scale_mixed(zero_padding(instant + window + normed, mask))
        grouped = self.group_norm(x.transpose(1, 2), mask).transpose(1, 2)
        return x + self.scale_mlp(zero_padding(self.mlp(grouped), mask)), mask


def boundary_distances(start: Tensor, end: Tensor, bins: Tensor, lengths: Sequence[int]) -> Tensor:
    """Expect the distances of each point to the ends of its action (trident head, section 3.3).

    The N + 1 points up to a point and those from it on are where its action may start and end: how
    likely each is says a softmax over what it scores as a boundary of a class, which all points
    share, plus what the point itself expects at that distance. Beyond the level's ends the
    boundaries score zero.

    Args:
        start: logits that a point is the start of an action of each class, `(B, P, K)`.
        end: logits that it is the end.
        bins: logits of the distances from N to 0 to the left, and from 0 to N to the right,
            `(B, P, 2, N + 1)`.
        lengths: points of each level.

    Returns:
        Expected distances to start and end in strides, `(B, P, K, 2)`.
    """
    reach = bins.shape[-1] - 1
    distance = torch.arange(reach + 1, device=bins.device, dtype=torch.float32)
    sides = (
        (start, (reach, 0), bins[:, :, None, 0], distance.flip(0)),
        (end, (0, reach), bins[:, :, None, 1], distance),
    )
    expected = []
    for boundary, (before, after), own, distances in sides:
        around = torch.cat(
            [
                F.pad(level, (0, 0, before, after)).unfold(1, reach + 1, 1)
                for level in boundary.split(list(lengths), dim=1)
            ],
            dim=1,
        )  # (B, P, K, N + 1)
        # A product and a sum, because autocast would round a matrix product's distances.
        expected.append(((around + own).softmax(dim=-1) * distances).sum(dim=-1))
    return torch.stack(expected, dim=-1)
