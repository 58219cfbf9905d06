"""VSGN: the video self-stitching graph network (Zhao, Thabet, Ghanem, ICCV 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from re2tal.detection.segments import Detections
from re2tal.errors import check_within
from re2tal.localizers.losses import balanced_cross_entropy, giou_loss
from re2tal.localizers.protocol import Instances, Losses, Targets, best
from re2tal.localizers.vsgn.graph import GraphPyramid
from re2tal.localizers.vsgn.heads import (
    BoundaryAdjustment,
    Head,
    SupplementaryScores,
    boundary_scores,
    inside_window,
)
from re2tal.localizers.vsgn.matching import (
    Anchors,
    anchors_of_nodes,
    make_anchors,
    match,
    score_losses,
    score_targets,
)
from re2tal.localizers.weights import Published


@dataclass(frozen=True, kw_only=True, slots=True)
class VSGNConfig:
    """VSGN's settings; the defaults are those published for THUMOS-14.

    Attributes:
        width: channels of the pyramid and the heads; a multiple of 32, or of 4 below 128.
        stem_stride: stride of the first convolution.
        levels: levels of the pyramid; level l has a node for each `2 * stem_stride * 2^l` features.
        graph: connect similar nodes in the encoder; false for plain convolutions of stride 2.
        neighbours: neighbours of a node in the graph, the node itself included.
        head_layers: convolutions of each head before the one that predicts, 0 for none.
        anchor_scales: lengths of a node's anchors, in strides of its level.
        match_tiou: least tIoU of a positive anchor, or moved anchor, with an action.
        adjust_tiou: least tIoU of a positive of the boundary adjustment.
        supplementary_weight: factor of the losses of start, end and action scores.
        score_threshold: the probability of a detection's class must exceed this.
        top_k: greatest number of detections of a sample, the best first.
        min_duration: detections must be longer than this, in feature-grid units.
    """

    width: int = 256
    stem_stride: int = 2
    levels: int = 5
    graph: bool = True
    neighbours: int = 12
    head_layers: int = 4
    anchor_scales: tuple[float, ...] = (1.0, 1.5)
    match_tiou: float = 0.5
    adjust_tiou: float = 0.7
    supplementary_weight: float = 0.2
    score_threshold: float = 0.005
    top_k: int = 2000
    min_duration: float = 0.05

    def __post_init__(self) -> None:
        check_within(
            self,
            width=(1, 2**16),
            stem_stride=(1, 64),
            levels=(1, 16),
            neighbours=(0, 2**12),
            head_layers=(0, 64),
            anchor_scales=(0, 1e6),
            supplementary_weight=(0, 1e6),
            score_threshold=(-1, 1),
            top_k=(1, 10**7),
            min_duration=(-1e6, 1e6),
        )
        if self.width < 4 or self.width % self.norm_groups:
            raise ValueError(
                f"A width of {self.width} cannot be cut into {self.norm_groups} groups for the "
                "group norm: make it a multiple of 32, or of 4 below 128."
            )
        if self.neighbours < 2:
            raise ValueError(
                f"A graph needs at least 2 neighbours, because a node is its own nearest one, but "
                f"got {self.neighbours}: set more, or graph=False."
            )
        if not 1 <= len(self.anchor_scales) <= 64 or min(self.anchor_scales) <= 0:
            raise ValueError(
                f"Anchors need 1 to 64 positive scales, not {len(self.anchor_scales)}: "
                f"{self.anchor_scales!r:.60}."
            )
        for name in ("match_tiou", "adjust_tiou"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must be above 0 and at most 1, but is {getattr(self, name)}."
                )

    @property
    def multiple(self) -> int:
        """Divisor of the number of features: the stride of the coarsest level."""
        multiple: int = self.stem_stride * 2**self.levels
        return multiple

    @property
    def norm_groups(self) -> int:
        """Groups of the group norm: 32, or fewer with 4 channels each."""
        return max(1, min(32, self.width // 4))

    def build(self, in_channels: int, num_classes: int) -> VSGN:
        """Build a VSGN for features of `in_channels` channels and `num_classes` classes."""
        return VSGN(self, in_channels, num_classes)


class Prediction(NamedTuple):
    """Predictions for A anchors and T features.

    Attributes:
        logits: `(B, A, K + 1)`; class 0 is the background.
        segments: `(B, A, 2)` moved anchors, in feature-grid units.
        adjusted: `(B, A, 2)` moved anchors with adjusted boundaries; an end may come before its
            start.
        yes: `(B, 3, T)` logarithms of the supplementary scores, see `SCORES`.
        no: `(B, 3, T)` logarithms of one minus the scores.
        valid: `(B, A)` bool, true for anchors of nodes that are not padding.
        anchors: the anchors.
        mask: `(B, T)` bool, the mask of the features.
    """

    logits: Tensor
    segments: Tensor
    adjusted: Tensor
    yes: Tensor
    no: Tensor
    valid: Tensor
    anchors: Anchors
    mask: Tensor


class VSGN(nn.Module):
    """Localizer that classifies and regresses anchors on a graph pyramid, and adjusts boundaries.

    A `re2tal.localizers.Localizer`. A stitched sample, a clip and its magnified copy, is recognised
    by its mask: a gap between two runs of features. Losses are "classification" (cross entropy),
    "regression" and "adjustment" (generalised IoU), and "start", "end" and "action" (balanced log
    loss, times `supplementary_weight`), each a mean over the batch.

    On a whole window the network computes the same as the authors' release, except that boundaries
    lie half a feature outside the first and the last feature (theirs: at them). Targets, padded
    windows and stitched windows differ:

    - Overlaps with actions are the plain tIoU; theirs lengthen the anchor by one feature, but not
      the action.
    - An action that overlaps no anchor has no positives; in theirs every anchor is a positive.
    - The targets of "end" lie around an action's end as those of "start" lie around its start;
      theirs lie one feature earlier, because their end is the last feature inside.
    - Losses exclude padding, are zero where nothing is positive (theirs: NaN), and take logarithms
      of the scores as they are (theirs: plus 1e-5).
    - Cross-scale edges lead from the clip to its copy and back, and never to nodes of the gap. In
      theirs, those of the copy lead to clip and gap, and those of the clip to any node.
    - Padding is zero at every layer, is never a neighbour, is not in the group norm's statistics,
      and has no detections; theirs treats it as features. A node and its anchors are valid if any
      feature of the node's cell is not padding.

    On a GPU the backward pass of the gathers adds in no fixed order, so gradients may differ
    between runs in their last digits, unless `torch.use_deterministic_algorithms` is on (not
    measured).

    Args:
        config: settings.
        in_channels: channels C of the features.
        num_classes: number of classes K.
    """

    def __init__(self, config: VSGNConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.multiple = config.multiple
        self.pyramid = GraphPyramid(
            in_channels,
            config.width,
            stem_stride=config.stem_stride,
            levels=config.levels,
            neighbours=config.neighbours if config.graph else 0,
        )

        def head(per_anchor: int) -> Head:
            return Head(
                config.width,
                per_anchor,
                anchors=len(config.anchor_scales),
                layers=config.head_layers,
                groups=config.norm_groups,
            )

        self.class_head = head(num_classes + 1)
        self.segment_head = head(2)
        self.supplementary = SupplementaryScores(config.width)
        self.adjustment = BoundaryAdjustment(config.width, self.pyramid.strides[0])

    def forward(
        self, features: Tensor, mask: Tensor, targets: Sequence[Targets] | None = None
    ) -> Losses | list[Detections]:
        """Compute losses against `targets`, or detections without them; see `Localizer`.

        Args:
            features: `(B, C, T)`, T a multiple of `stem_stride * 2 ** levels`.
            mask: `(B, T)` bool, false on padding and in the gap of a stitched sample.
            targets: actions of each window, in feature-grid units.

        Raises:
            ValueError: if T is not such a multiple, or a label is not below `num_classes`.
        """
        predicted = self.predict(features, mask)
        return self.decode(predicted) if targets is None else self.losses(predicted, targets)

    def begin_step(self, masks: Sequence[Tensor], targets: Sequence[Sequence[Targets]]) -> None:
        """Do nothing: which anchors are positive depends on where the network moves them.

        The losses of each pass are divided by its counts over all ranks. The passes of an
        accumulated step therefore weigh the same, whatever their counts.
        """

    def predict(self, features: Tensor, mask: Tensor) -> Prediction:
        """Run the network, up to the tensors that become losses or detections; see `forward`."""
        length = features.shape[2]
        levels, valid = self.pyramid(features, mask)
        anchors = make_anchors(
            length, self.pyramid.strides, self.config.anchor_scales, features.device
        )
        segments = anchors.decode(self.segment_head(levels, valid))
        yes, no = self.supplementary(levels[0], length)
        return Prediction(
            logits=self.class_head(levels, valid),
            segments=segments,
            adjusted=self.adjustment(segments, levels[0]),
            yes=yes,
            no=no,
            valid=anchors_of_nodes(valid, len(self.config.anchor_scales)),
            anchors=anchors,
            mask=mask,
        )

    def losses(self, predicted: Prediction, targets: Sequence[Targets]) -> Losses:
        """Compute losses; see `Localizer`."""
        config, mask, valid = self.config, predicted.mask, predicted.valid
        instances = Instances.of(targets, self.num_classes, mask.device)
        # Regression is trained on the original anchors' matches.
        original = match(predicted.anchors.segments[None], valid, instances, config.match_tiou)
        # Classes are matched with the moved anchors, not with the original ones.
        moved = predicted.segments.detach()
        classes = match(moved, valid, instances, config.match_tiou).classes
        refined = match(moved, valid, instances, config.adjust_tiou)
        boundaries = score_targets(instances, mask.shape[1])
        # In evaluation ranks may have different numbers of passes, so they must not communicate.
        ranks = {"all_ranks": self.training}
        scores = score_losses(predicted.yes, predicted.no, boundaries, mask, **ranks)
        return {
            "classification": balanced_cross_entropy(predicted.logits, classes, valid, **ranks),
            "regression": giou_loss(
                predicted.segments, original.segments, original.positive, **ranks
            ),
            # The gradients of this loss reach the regression too.
            "adjustment": giou_loss(
                predicted.adjusted, refined.segments, refined.positive, **ranks
            ),
            **{name: config.supplementary_weight * loss for name, loss in scores.items()},
        }

    @torch.no_grad()
    def decode(self, predicted: Prediction) -> list[Detections]:
        """Decode the detections of each sample, by falling score."""
        segments = inside_window(predicted.adjusted, predicted.yes.shape[2])  # before scoring
        classes = predicted.logits.softmax(dim=2)[..., 1:]  # without the background
        scores = classes * boundary_scores(predicted.yes, segments)[..., None]
        long_enough = segments[..., 1] - segments[..., 0] > self.config.min_duration
        kept = (classes > self.config.score_threshold) & (predicted.valid & long_enough)[..., None]
        return [
            best(*sample, most=self.config.top_k)
            for sample in zip(scores, segments, kept, strict=True)
        ]

    def published(self) -> Published:
        """Names of the weights in the authors' release."""
        config = self.config
        layers = _layers(config.levels, config.head_layers, graph=config.graph)
        return Published(
            title="VSGN of its authors",
            names={
                f"{ours}.{kind}": (f"{theirs}.{kind}",)
                for theirs, ours in layers
                for kind in ("weight", "bias")
            },
        )


def _layers(levels: int, head_layers: int, *, graph: bool) -> Iterator[tuple[str, str]]:
    """Yield the release's name and ours of each layer."""
    yield "xGPN.conv0.0", "pyramid.stem"
    for i in range(levels):
        if graph:
            yield f"xGPN.levels_enc.{i}.tconv1", f"pyramid.encoder.{i}.conv"
            yield f"xGPN.levels_enc.{i}.nconv1.mlp", f"pyramid.encoder.{i}.edge"
        else:
            yield f"xGPN.levels_enc.{i}.0", f"pyramid.encoder.{i}.conv"
        yield f"xGPN.levels1.{i}.0", f"pyramid.outs.{i}"
    for i in range(levels - 1):
        yield f"xGPN.levels2.{i}.0", f"pyramid.laterals.{i}"
        yield f"xGPN.levels_dec.{i}.0", f"pyramid.ups.{i}"
    for tower, last, head in (
        ("cls_tower", "cls_logits", "class_head"),
        ("bbox_tower", "bbox_pred", "segment_head"),
    ):
        for i in range(head_layers):
            yield f"head_dec.{tower}.{3 * i}", f"{head}.convs.{i}"
            yield f"head_dec.{tower}.{3 * i + 1}", f"{head}.norms.{i}"
        yield f"head_dec.{last}", f"{head}.last"
    for side in ("start", "end"):
        yield f"bd_adjust.{side}_conv.0", f"adjustment.{side}.taps"
        yield f"bd_adjust.{side}_conv.2", f"adjustment.{side}.last"
    for theirs, name in (("startness", "start"), ("endness", "end"), ("actionness", "action")):
        yield f"head_{theirs}.0", f"supplementary.heads.{name}.conv"
        yield f"head_{theirs}.2", f"supplementary.heads.{name}.last"
