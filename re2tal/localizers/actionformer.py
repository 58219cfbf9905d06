"""ActionFormer: localizing moments of actions with transformers (Zhang, Wu, Li, ECCV 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.detection.segments import Detections
from re2tal.errors import check_within
from re2tal.localizers.layers import (
    ConvHead,
    Embedding,
    HalvingPyramid,
    LevelScale,
    Strip,
    TransformerBlock,
)
from re2tal.localizers.losses import LossNormalizer, diou_loss, focal_loss
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

# Rules from our names of weights to those of the authors' release; each changes another part.
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
class ActionFormerConfig(PointConfig):
    """ActionFormer's settings; the defaults are those published for THUMOS-14.

    Attributes:
        streams: for several kinds of features side by side: input channels and share of `width` of
            each kind, which gets its own projection. Empty for one kind.
        embed_layers: convolutions that project the features; 0 only with `streams`.
        window: odd width of the local attention, for all levels or for each; 0 is global.
        heads: heads of the attention.
        input_dropout: dropout of whole channels of the features.
        dropout: dropout in the transformer's MLPs and after its attention.
        shortest_only: give a point that fits several instances only the classes of the shortest;
            otherwise those of all.
    """

    streams: tuple[tuple[int, int], ...] = ()
    embed_layers: int = 2
    window: int | tuple[int, ...] = 19
    heads: int = 4
    input_dropout: float = 0.0
    dropout: float = 0.0
    shortest_only: bool = True

    def __post_init__(self) -> None:
        PointConfig.__post_init__(self)
        # Without streams, only these convolutions project features to the width.
        embed = 0 if self.streams else 1
        check_within(
            self,
            embed_layers=(embed, 64),
            window=(0, 2**16),
            heads=(1, 2**10),
            input_dropout=(0, 1),
            dropout=(0, 1),
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
    def windows(self) -> tuple[int, ...]:
        """Width of the attention at each level."""
        return (self.window,) * self.levels if isinstance(self.window, int) else self.window

    def build(self, in_channels: int, num_classes: int) -> ActionFormer:
        """Build an ActionFormer for `in_channels` channels and `num_classes` classes."""
        return ActionFormer(self, in_channels, num_classes)


class ActionFormer(nn.Module):
    """Localizer that predicts class and distances to an action's ends at each point of a pyramid.

    A `re2tal.localizers.Localizer`. Losses are "classification" (focal) and "regression"
    (distance-IoU of the positive points, times `regression_weight`), both divided by a running
    mean of the number of positive points.

    It computes the same as the authors' implementation, with three exceptions: windows without a
    valid step stay finite under global attention; the top level regresses any distance (theirs: up
    to 10000); among equal scores the earlier point comes first. Features of padded steps are those
    of the published model: finite, and independent of the content of the padding. As in that model,
    the last steps of a video depend slightly on what follows: padding, which takes the biases of
    the layer norms, or the end of the tensor (zeros). So the amount of padding is part of the
    model.

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
        self.normalizer = LossNormalizer(config.initial_normalizer)
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
            branch=[block(window, 2) for window in config.windows[1:]],  # one level each
        )
        width, layers = config.head_width, config.head_layers
        self.class_head = ConvHead(config.width, width, num_classes, layers=layers)
        self.offset_head = ConvHead(config.width, width, 2, layers=layers)
        self.offset_scale = LevelScale(config.levels)
        start_scores(self.class_head, config.prior, config.empty_classes)

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
        positive = valid & (actual.classes > 0).any(dim=2)  # (B, P)
        count = self.normalizer(positive.sum())
        smoothing = self.config.label_smoothing
        regression = diou_loss(offsets, actual.offsets, positive)
        return {
            "classification": focal_loss(logits, actual.classes, valid, smoothing=smoothing)
            / count,
            "regression": self.config.regression_weight * regression / count,
        }

    def decode(self, predicted: Predicted) -> list[Detections]:
        """Decode detections; see `Localizer`."""
        return decode(self.config, *predicted)

    def begin_step(self, masks: Sequence[Tensor], targets: Sequence[Sequence[Targets]]) -> None:
        """Count the positive points of a whole step, by which the losses are divided."""
        count_positives(self.normalizer, self.config, masks, targets, self._assign)

    def _assign(self, points: Points, targets: Sequence[Targets]) -> PointTargets:
        return assign(
            points,
            targets,
            self.num_classes,
            radius=self.config.centre_radius,
            shortest_only=self.config.shortest_only,
        )

    def predict(self, features: Tensor, mask: Tensor) -> Predicted:
        """Run the network, up to the logits and distances of each point.

        Args:
            features: `(B, C, T)`.
            mask: `(B, T)` bool.

        Returns:
            Logits of the classes `(B, P, K)`, distances to start and end in strides
            `(B, P, 2)`, the mask `(B, P)` of points that are not padding, and the points.
        """
        pyramid = self.pyramid(features, mask)
        strip = Strip.lay_out(pyramid)
        points = make_points(features.shape[2], self.config.ranges, features.device)
        logits = self.class_head(strip)
        # ReLU: a positive point lies inside its action, so both distances are non-negative
        offsets = F.relu(self.offset_scale(self.offset_head(strip), points.lengths))
        return logits, offsets, strip.valid[:, strip.points], points

    def published(self) -> Published:
        """Names of the weights in the public implementation, which computes the same function.

        To reproduce its evaluation, pad each video as it does: to the length of the training's
        windows, or, if the video is longer, to the next multiple of the largest
        `2^level * (attention window - 1)` (`2^level` where attention is global); see
        `ActionFormer`. Its models trained with a drop path of 0 have no residual scales; their
        weights do not fit. It does not save the running mean of positive points.
        """
        names = {name: (renamed(name, _RENAMED),) for name in self.state_dict()}
        scales = tuple(f"reg_head.scale.{level}.scale" for level in range(self.config.levels))
        return Published(
            title="ActionFormer of its authors",
            names={**names, "offset_scale.scale": scales, "normalizer.mean": ()},
            left_out=("point_generator.", "backbone.pos_embd"),
        )
