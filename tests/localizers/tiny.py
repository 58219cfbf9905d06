"""A third localizer, all of it in this one file: every feature says whether an action is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from re2tal.detection.segments import Detections
from re2tal.localizers.protocol import Losses, Targets


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyConfig:
    """The settings of `Tiny`.

    Attributes:
        kernel: features that a prediction sees.
    """

    kernel: int = 3

    def build(self, in_channels: int, num_classes: int) -> Tiny:
        """A `Tiny` with random weights."""
        return Tiny(self, in_channels, num_classes)


class Tiny(nn.Module):
    """Scores each class at each feature; runs of high scores are its detections."""

    def __init__(self, config: TinyConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.multiple = 1
        self.score = nn.Conv1d(in_channels, num_classes, config.kernel, padding="same")

    def begin_step(self, masks: Sequence[Tensor], targets: Sequence[Sequence[Targets]]) -> None:
        """Its loss is a mean over each pass: nothing has to be known of the others."""

    def predict(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(features.masked_fill(~mask[:, None], 0)), mask

    def forward(
        self, features: Tensor, mask: Tensor, targets: Sequence[Targets] | None = None
    ) -> Losses | list[Detections]:
        predicted = self.predict(features, mask)
        return self.decode(predicted) if targets is None else self.losses(predicted, targets)

    def decode(self, predicted: tuple[Tensor, Tensor]) -> list[Detections]:
        return [
            self._runs(sample[:, valid].sigmoid()) for sample, valid in zip(*predicted, strict=True)
        ]

    def losses(self, predicted: tuple[Tensor, Tensor], targets: Sequence[Targets]) -> Losses:
        logits, mask = predicted
        wanted = torch.zeros_like(logits)
        place = torch.arange(logits.shape[2], device=logits.device)
        for row, target in zip(wanted, targets, strict=True):
            for (start, end), label in zip(target.segments, target.labels, strict=True):
                row[label, (place >= start) & (place <= end)] = 1
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return {"score": each[mask[:, None].expand_as(each)].mean()}

    def _runs(self, scores: Tensor) -> Detections:
        found: list[tuple[float, float, float, int]] = []
        for label, row in enumerate(scores.tolist()):
            threshold = sum(row) / len(row)
            start = None
            for place, score in enumerate([*row, float("-inf")]):
                if score > threshold and start is None:
                    start = place
                elif score <= threshold and start is not None:
                    found.append((start - 0.5, place - 0.5, max(row[start:place]), label))
                    start = None
        table = torch.tensor(found).reshape(-1, 4)
        return Detections(
            segments=table[:, :2], scores=table[:, 2], labels=table[:, 3].to(torch.int64)
        )
