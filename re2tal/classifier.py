"""Classification of clips: the simplest localizer, whose only segment is the clip itself.

With a backbone it is a video classifier, for pretraining and for finetuning rewired backbones. Like
any localizer it is part of a `Detector`, and is saved and loaded with it (`re2tal.trained`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.detection.segments import Detections
from re2tal.detector import Detector
from re2tal.localizers.losses import over_ranks
from re2tal.localizers.protocol import Losses, Targets


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipClassifierConfig:
    """Settings of a linear layer on the mean of the features.

    Attributes:
        dropout: dropout of channels of the mean.
        label_smoothing: share of the targets that is spread over all classes.

    Raises:
        ValueError: a field is not in [0, 1).
    """

    dropout: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"ClipClassifierConfig.{name} must be in [0, 1), not {getattr(self, name)}."
                )

    def build(self, in_channels: int, num_classes: int) -> ClipClassifier:
        """Build a classifier with random weights.

        Args:
            in_channels: channels C of the features.
            num_classes: number of classes, at least 1.
        """
        return ClipClassifier(self, in_channels, num_classes)


class ClipClassifier(nn.Module):
    """Localizer of whole clips: mean over time, dropout, linear layer.

    Args:
        config: dropout and label smoothing.
        in_channels: channels C of the features.
        num_classes: number of classes K.

    Attributes:
        num_classes: number of classes; labels are 0 to `num_classes - 1`.
        multiple: 1: a clip may have any number of features.
    """

    multiple = 1

    def __init__(self, config: ClipClassifierConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(in_channels, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self._passes = 0  # coming passes of the step whose clips are already counted
        self._clips_a_pass = torch.ones(())  # mean number of clips over passes and ranks

    def forward(
        self, features: Tensor, mask: Tensor, targets: Sequence[Targets] | None = None
    ) -> Losses | list[Detections]:
        """Compute the cross-entropy, or all classes of each clip as detections that span it.

        Args:
            features: `(B, C, T)`.
            mask: `(B, T)` bool, false on padding.
            targets: one action for each clip, or none to exclude the clip from the loss.

        Returns:
            Result as of a `re2tal.localizers.Localizer`; scores are probabilities that sum to 1.

        Raises:
            ValueError: a clip has several actions.
        """
        predicted = self.predict(features, mask)
        return self.decode(predicted) if targets is None else self.losses(predicted, targets)

    def losses(self, predicted: tuple[Tensor, Tensor], targets: Sequence[Targets]) -> Losses:
        """Compute the cross-entropy; see `Localizer`."""
        logits, mask = predicted
        labels = _labels(targets, logits.device)
        if self.training:
            if not self._passes:
                self.begin_step([mask], [targets])
            self._passes -= 1
            count = self._clips_a_pass
        else:
            count = _counted(labels).clamp(min=1)
        loss = F.cross_entropy(
            logits.float(),
            labels,
            ignore_index=-1,
            label_smoothing=self.config.label_smoothing,
            reduction="sum",
        )
        return {"classification": loss / count}

    def decode(self, predicted: tuple[Tensor, Tensor]) -> list[Detections]:
        """Make all classes of each clip detections that span it; see `Localizer`."""
        logits, mask = predicted
        return _spanning(logits.float().softmax(dim=1), mask)

    def predict(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits `(B, K)` of features `(B, C, T)` where `mask` `(B, T)` is true.

        Returns:
            The logits, and the mask.
        """
        valid = mask[:, None]
        total = torch.where(valid, features, 0).sum(dim=2)  # not a product: padding may be NaN
        mean = total / valid.sum(dim=2).clamp(min=1)
        return self.linear(self.dropout(mean)), mask

    def begin_step(self, masks: Sequence[Tensor], targets: Sequence[Sequence[Targets]]) -> None:
        """Count the clips of a whole step, by which the losses are divided."""
        every = [target for of_pass in targets for target in of_pass]
        total, ranks = over_ranks(_counted(_labels(every, self.linear.weight.device)))
        self._passes = len(masks)
        # DDP averages over ranks and accumulation over passes, so that total / (ranks passes)
        # makes the step's loss the mean over its clips.
        self._clips_a_pass = total.clamp(min=1) / (ranks * self._passes)


Classifier: TypeAlias = Detector[Any, ClipClassifier]
"""Backbone with a `ClipClassifier`, built by a `DetectorSpec` with a `ClipClassifierConfig`."""


def class_scores(classifier: Classifier, frames: Tensor, mask: Tensor) -> Tensor:
    """Compute the class probabilities of clips.

    Args:
        classifier: classifier in evaluation mode.
        frames: uint8 `(B, T, H, W, 3)`, T a multiple of the backbone's temporal stride.
        mask: `(B, T)` bool, false on padding.

    Returns:
        Probabilities, float32 `(B, K)`; each row sums to 1.
    """
    features = classifier.backbone(classifier.normalized(frames))
    logits, _ = classifier.localizer.predict(features, classifier.feature_mask(mask))
    return logits.float().softmax(dim=1)


def _labels(targets: Sequence[Targets], device: torch.device) -> Tensor:
    """List class numbers `(B,)`, -1 for clips without a class."""
    if any(len(target.labels) > 1 for target in targets):
        raise ValueError("A classified clip has one class, but got several for one clip.")
    labels = [
        target.labels if len(target.labels) else target.labels.new_full((1,), -1)
        for target in targets
    ]
    return torch.cat(labels).to(device)


def _counted(labels: Tensor) -> Tensor:
    return (labels >= 0).sum().float()


def _spanning(scores: Tensor, mask: Tensor) -> list[Detections]:
    """Make a segment over each clip's valid features for every class, by falling score."""
    found = []
    for of_clip, valid in zip(scores, mask.sum(dim=1), strict=True):
        order = of_clip.argsort(descending=True, stable=True)
        end = valid.float() - 0.5  # the window spans -0.5 to T - 0.5
        span = torch.stack([torch.full_like(end, -0.5), end])
        found.append(
            Detections(segments=span.expand(len(order), 2), scores=of_clip[order], labels=order)
        )
    return found


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Count the classes ranked before the right one; on ties the lower class number is first.

    Args:
        scores: `(N, K)`, finite.
        labels: `(N,)` class numbers.

    Returns:
        int64 `(N,)`, 0 where the right class is the best.

    Raises:
        ValueError: scores are not finite, so their order is undefined.
    """
    if not torch.isfinite(scores).all():
        raise ValueError("Scores of classes must be finite to be compared.")
    right = scores.gather(1, labels[:, None])
    number = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > right) | ((scores == right) & (number < labels[:, None]))  # (N, K)
    return before.sum(dim=1)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """Compute the share of samples whose class is among the `k` with the highest scores.

    Args:
        scores: `(N, K)`, N at least 1.
        labels: `(N,)` class numbers.
        k: number of classes in an answer; if K is smaller, every answer is right.
    """
    return float((label_ranks(scores, labels) < k).double().mean())


def mean_class_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Average the top-1 accuracy over the classes that have samples.

    Args:
        scores: `(N, K)`, N at least 1.
        labels: `(N,)` class numbers.
    """
    right = (label_ranks(scores, labels) == 0).double()
    there = [right[labels == label].mean() for label in labels.unique()]
    return float(torch.stack(there).mean())
