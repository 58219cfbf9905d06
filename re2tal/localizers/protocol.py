"""Protocol of localizers: temporal features in, losses or detections out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from re2tal.detection.segments import Detections
from re2tal.errors import UserError

Losses = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Actions of one window.

    Attributes:
        segments: `(N, 2)` float32 `[start, end]` in feature-grid units (feature j sits at j).
        labels: `(N,)` int64 class indices.
    """

    segments: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        count = self.labels.shape[0] if self.labels.ndim == 1 else -1
        if self.segments.shape != (count, 2):
            raise ValueError(
                f"Targets need segments (N, 2) and labels (N,), but got "
                f"{tuple(self.segments.shape)} and {tuple(self.labels.shape)}."
            )

    def to(self, device: torch.device | str) -> Targets:
        """Copy to `device`; tensors that are there already are not copied."""
        return Targets(segments=self.segments.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, kw_only=True, slots=True)
class Instances:
    """Actions of B windows as tensors, at most N each.

    Attributes:
        segments: `(B, N, 2)` float32 in feature-grid units.
        labels: `(B, N)` int64, -1 where a window has fewer than N actions. The segment there is
            `[0, 0]`, which overlaps nothing.
    """

    segments: Tensor
    labels: Tensor

    @staticmethod
    def of(targets: Sequence[Targets], num_classes: int, device: torch.device) -> Instances:
        """Pad the targets of a batch to a common number, at least one.

        Args:
            targets: targets of B windows.
            num_classes: number of classes K, for the check of the labels.
            device: device of the result.

        Raises:
            ValueError: if a label is not one of the K.
        """
        for target in targets:
            wrong = target.labels[(target.labels < 0) | (target.labels >= num_classes)]
            if len(wrong):
                raise ValueError(
                    f"A target has label {int(wrong[0])}, but the localizer was built for "
                    f"{num_classes} classes (0 to {num_classes - 1})."
                )
        # One more window with a padding action, removed below, makes N at least 1.
        nothing = torch.zeros(1, 2, device=device), torch.full((1,), -1, device=device)
        segments = [target.segments.to(device, torch.float32) for target in targets]
        labels = [target.labels.to(device) for target in targets]
        padded_segments = pad_sequence([*segments, nothing[0]], batch_first=True)
        padded_labels = pad_sequence([*labels, nothing[1]], batch_first=True, padding_value=-1)
        return Instances(segments=padded_segments[:-1], labels=padded_labels[:-1])


@runtime_checkable
class LocalizerConfig(Protocol):
    """Settings of a localizer: a frozen dataclass that builds the module.

    A new localizer is one file with such a class and the module. Recipes and `DetectorSpec` take
    the dataclass as it is.
    """

    def build(self, in_channels: int, num_classes: int) -> Any:
        """Build a `Localizer` module with random weights.

        Args:
            in_channels: channels C of the features.
            num_classes: number of classes; 1 for a class-agnostic localizer, which makes proposals.
        """
        ...


class Localizer(Protocol):
    """Model that finds actions in temporal features; a `torch.nn.Module` in practice.

    Attributes:
        num_classes: labels are 0 to `num_classes - 1`.
        multiple: a window's number of features must be a multiple of this.
    """

    num_classes: int
    multiple: int

    def __call__(
        self, features: Tensor, mask: Tensor, targets: Sequence[Targets] | None = None
    ) -> Losses | list[Detections]:
        """Compute losses against `targets`, or detections without them.

        Args:
            features: `(B, C, T)` features.
            mask: `(B, T)` bool, true at features of the video, false at padding. Padded features
                must not influence the result, whatever they hold.
            targets: actions of each window.

        Returns:
            With targets: scalar loss terms, whose sum is to be minimised. Without: the
            detections of each window in feature-grid units, before non-maximum suppression.
        """
        ...

    def begin_step(self, masks: Sequence[Tensor], targets: Sequence[Sequence[Targets]]) -> None:
        """Receive all windows of this rank's training step before its forward passes.

        Many localizers divide their losses by a count over the whole step. Without this call each
        forward pass with targets is a step of its own.

        Args:
            masks: masks of each pass, `(B, T)` bool.
            targets: targets of each pass.
        """
        ...

    def predict(self, features: Tensor, mask: Tensor) -> tuple[Any, ...]:
        """Run the network, up to the tensors that become losses or detections.

        `re2tal.memory` runs this method on tensors without data to predict memory; a validation
        takes both losses and detections from one result.

        Args:
            features: `(B, C, T)` features.
            mask: `(B, T)` bool.

        Returns:
            A tuple; losses are computed from those of its tensors that need gradients.
        """
        ...

    def losses(self, predicted: Any, targets: Sequence[Targets]) -> Losses:
        """Compute the losses of a result of `predict`, as a call with targets does."""
        ...

    def decode(self, predicted: Any) -> list[Detections]:
        """Decode the detections of a result of `predict`, as a call without targets does."""
        ...


def require_localizer(localizer: object) -> None:
    """Check that a localizer has all parts, of which some are used after the first epoch only.

    Raises:
        UserError: parts are missing; the message lists them.
    """
    parts = ("num_classes", "multiple", "begin_step", "predict", "losses", "decode")
    if missing := [name for name in parts if not hasattr(localizer, name)]:
        raise UserError(
            f"{type(localizer).__name__} is not a localizer: it has no {', no '.join(missing)}. "
            "The protocol re2tal.localizers.Localizer describes them."
        )


def best(scores: Tensor, segments: Tensor, counted: Tensor, *, most: int) -> Detections:
    """Select the detections of one window by falling score; ties by place, then by class.

    Args:
        scores: `(P, K)` scores of K classes at P places.
        segments: `(P, 2)` segments of the places in feature-grid units, or `(P, K, 2)`, one for
            each class.
        counted: `(P, K)` bool, true where a score may become a detection.
        most: greatest number of detections.
    """
    classes = scores.shape[1]
    flat = scores.flatten()  # index: place * K + class
    candidates = counted.flatten().nonzero()[:, 0]
    order = flat[candidates].argsort(descending=True, stable=True)[:most]
    kept = candidates[order]
    found = segments[kept // classes] if segments.dim() == 2 else segments.flatten(0, 1)[kept]
    return Detections(segments=found, scores=flat[kept], labels=kept % classes)
