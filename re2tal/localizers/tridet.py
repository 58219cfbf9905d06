"""TriDet: temporal action detection with relative boundary modelling (Shi et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    Predicted,
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

# Rules from our names of weights to those of the authors' release; each changes another part.
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

    Layers at full rate have a narrow window of one step, no residual scales and no drop path.
    `prior` is also the initial probability that a point is a boundary.

    Attributes:
        window: width of SGP's narrow window in steps, odd.
        widening: width of SGP's wide window is this factor times `window + 1`, rounded to odd.
        mlp_width: hidden channels of the MLP in each SGP layer.
        filter_start: initial standard deviation of SGP's filters. Each of SGP's two branches is a
            product of filters. With 0, published for THUMOS-14 and EPIC-Kitchens-100, neither
            branch has a gradient and both stay at zero: the layer is a normalisation and an MLP.
            Published are 0.1 for HACS and 0.2 for ActivityNet-1.3.
        input_noise: standard deviation of the noise added to the features in training.
        bins: greatest distance of a boundary from its point, in strides; a boundary is an
            expectation over the `bins + 1` points on its side.
        iou_power: exponent of the IoU that weights the classification loss of positives.
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
    """Localizer that predicts an action's ends as expectations over the points near each point.

    A `re2tal.localizers.Localizer`. Losses are "classification" (focal; for positives times a power
    of the IoU of the regressed segment) and "regression" (distance-IoU of each positive point and
    class, times `regression_weight`), both divided by a running mean of the number of positive
    points.

    On windows without padding it computes the same as the authors' implementation, with three
    exceptions: the top level regresses any distance (theirs: up to 10000); the IoU in the weight of
    the classification is clamped to at least 1e-8, which keeps its gradient finite; among equal
    scores the earlier point comes first. Padding acts like the end of the tensor: results on a
    padded window equal those on the window without padding. The authors' code includes padding in
    the means and in the normalisation of the SGP layers. Heads have kernel 3 here (theirs: 5 and 1
    for HACS).

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

    def forward(
        self, features: Tensor, mask: Tensor, targets: Sequence[Targets] | None = None
    ) -> Losses | list[Detections]:
        """Compute losses against `targets`, or detections without them; see `Localizer`.

        Raises:
            ValueError: if T is not a multiple of `multiple`, or a label is not below `num_classes`.
        """
        predicted = self.predict(features, mask)
        return self.decode(predicted) if targets is None else self.losses(predicted, targets)

    def losses(self, predicted: Predicted, targets: Sequence[Targets]) -> Losses:
        """Compute losses; see `Localizer`."""
        logits, offsets, valid, points = predicted
        actual = self._assign(points, targets)
        config = self.config
        positive = valid[..., None] & (actual.classes > 0)  # (B, P, K)
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

    def decode(self, predicted: Predicted) -> list[Detections]:
        """Decode detections; see `Localizer`."""
        return decode(self.config, *predicted)

    def begin_step(self, masks: Sequence[Tensor], targets: Sequence[Sequence[Targets]]) -> None:
        """Count the positive points of a whole step, by which the losses are divided."""
        count_positives(self.normalizer, self.config, masks, targets, self._assign)

    def _assign(self, points: Points, targets: Sequence[Targets]) -> PointTargets:
        return assign(points, targets, self.num_classes, radius=self.config.centre_radius)

    def predict(self, features: Tensor, mask: Tensor) -> Predicted:
        """Run the network, up to the logits and distances of each point.

        Args:
            features: `(B, C, T)`.
            mask: `(B, T)` bool.

        Returns:
            Logits of the classes `(B, P, K)`, distances to start and end of each class in strides
            `(B, P, K, 2)`, the mask `(B, P)` of points that are not padding, and the points.
        """
        if self.training and self.config.input_noise:
            features = features + self.config.input_noise * torch.randn_like(features)
        strip = Strip.lay_out(self.pyramid(features, mask))
        # The heads treat padding like the gaps between levels.
        inner = zero_padding(strip.features, strip.valid)
        strip = replace(strip, features=inner, inside=strip.valid)
        valid = strip.valid[:, strip.points]
        points = make_points(features.shape[2], self.config.ranges, features.device)
        bins = F.relu(self.offset_scale(self.offset_head(strip), points.lengths))
        # No gradient flows from the boundary heads into the pyramid.
        alone = replace(strip, features=inner.detach())
        offsets = boundary_distances(
            zero_padding(self.start_head(alone), valid),
            zero_padding(self.end_head(alone), valid),
            bins.unflatten(2, (2, -1)),  # (B, P, 2, N + 1)
            points.lengths,
        )
        return self.class_head(strip), offsets, valid, points

    def published(self) -> Published:
        """Names of the weights in the authors' release; see `TriDet` for what differs.

        Models that were trained with a drop path of 0 have no residual scales; their weights do
        not fit. The release does not save the running mean of positive points.
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

    With normalised features x and depthwise filters FC, Conv_w (narrow) and Conv_kw (wide),
    `FC(x) * ReLU(FC'(mean(x))) + Conv'_w(x) * (Conv_w(x) + Conv_kw(x)) + x`: the instant-level
    branch, with a gate from the mean of the whole window, and the window-level branch (Shi et al.,
    CVPR 2023, eq. 1). A layer that halves first takes a maximum over three steps.

    Args:
        config: settings.
        halves: false for the layers at full rate. Their narrow window is one step, and their
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
            # Padding must never be the maximum. Each valid output step is itself in its window, so
            # its maximum is finite.
            x = x.masked_fill(~mask[..., None], -torch.inf).transpose(1, 2)
            mask = mask[:, ::2]
            x = F.max_pool1d(x, 3, 2, padding=1).transpose(1, 2)
            x = x.masked_fill(~mask[..., None], 0)
        normed = zero_padding(self.norm(x), mask)
        # over valid steps only; the clamp is for windows without any
        mean = normed.sum(dim=1, keepdim=True) / mask.sum(dim=1).clamp(min=1)[:, None, None]
        instant = self.instant(normed) * F.relu(self.video_gate(mean))
        window = (self.narrow(normed) + self.wide(normed)) * self.window_gate(normed)
        x = x + self.scale_mixed(zero_padding(instant + window + normed, mask))
        grouped = self.group_norm(x.transpose(1, 2), mask).transpose(1, 2)
        return x + self.scale_mlp(zero_padding(self.mlp(grouped), mask)), mask


def boundary_distances(start: Tensor, end: Tensor, bins: Tensor, lengths: Sequence[int]) -> Tensor:
    """Compute expected distances of each point to its action's ends (trident head, section 3.3).

    The start is one of the N + 1 points up to a point, the end one of the N + 1 points from it on.
    With softmax weights over the distances d = 0..N, for point i and class k:
    `p(d) = softmax_d(start[i - d, k] + bins[i, d])`, and the result is `sum_d p(d) d`; likewise
    with `end[i + d, k]`. All points share the boundary logits, which are zero beyond the ends of
    the level.

    Args:
        start: logits that a point is the start of an action of each class, `(B, P, K)`.
        end: logits that a point is the end, `(B, P, K)`.
        bins: each point's logits of the distances from N to 0 to the left, and from 0 to N to the
            right, `(B, P, 2, N + 1)`.
        lengths: number of points of each level.

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
        # A product and a sum: autocast would round the distances in a matrix product.
        expected.append(((around + own).softmax(dim=-1) * distances).sum(dim=-1))
    return torch.stack(expected, dim=-1)
