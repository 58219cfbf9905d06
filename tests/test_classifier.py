"""The clip classifier as a localizer, in a detector, and how its answers are judged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from re2tal.backbones.swin import swin_toy
from re2tal.classifier import (
    ClipClassifier,
    ClipClassifierConfig,
    class_scores,
    mean_class_accuracy,
    top_k_accuracy,
)
from re2tal.errors import UserError
from re2tal.localizers import Targets
from re2tal.trained import DetectorSpec, load_detector, save_detector
from re2tal.videos.windows import WindowConfig


def target(*labels: int) -> Targets:
    segments = torch.tensor([[-0.5, 3.5]] * len(labels)).reshape(-1, 2)
    return Targets(segments=segments, labels=torch.tensor(labels, dtype=torch.int64))


def head(**settings: Any) -> ClipClassifier:
    torch.manual_seed(0)
    built = ClipClassifierConfig(**{"dropout": 0.0, **settings}).build(6, 5)
    torch.nn.init.normal_(built.linear.weight)
    return built


def inputs(batch: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(8) < torch.tensor([8, 5, 1, 3])[:batch, None]
    return torch.randn(batch, 6, 8), mask


def loss_of(classifier: ClipClassifier, *batch: Any) -> Tensor:
    losses = classifier(*batch)
    assert isinstance(losses, dict)
    return losses["classification"]


def cross_entropy(classifier: ClipClassifier, clip: Tensor, label: int) -> Tensor:
    """The loss of one clip (C, T) by the definition."""
    logits = classifier.linear.weight @ clip.mean(dim=1) + classifier.linear.bias
    return -(logits[label] - logits.exp().sum().log())


def test_the_loss_is_the_cross_entropy_of_the_mean_over_valid_features() -> None:
    classifier, (features, mask) = head(), inputs()
    labels = (2, 0, 4, 4)
    expected = torch.stack(
        [
            cross_entropy(classifier, clip[:, valid], label)
            for clip, valid, label in zip(features, mask, labels, strict=True)
        ]
    ).mean()
    features = features.masked_fill(~mask[:, None], float("nan"))
    found = loss_of(classifier, features, mask, [target(label) for label in labels])
    torch.testing.assert_close(found, expected)


def test_clips_without_a_class_count_nothing() -> None:
    classifier, (features, mask) = head(), inputs()
    mask[1] = False
    some = loss_of(classifier, features, mask, [target(2), target(), target(4), target()])
    pair = loss_of(classifier, features[::2], mask[::2], [target(2), target(4)])
    torch.testing.assert_close(some, pair)
    assert loss_of(classifier, features, mask, [target()] * 4) == 0
    with pytest.raises(ValueError, match="has one class"):
        classifier(features, mask, [target(1, 2), target(), target(), target()])


def test_passes_of_a_step_average_to_the_loss_of_the_step() -> None:
    classifier, (features, mask) = head(label_smoothing=0.1), inputs()
    targets = [target(2), target(), target(4), target(1)]
    whole = loss_of(classifier, features, mask, targets)
    parts = [slice(0, 2), slice(2, 4)]
    classifier.begin_step([mask[part] for part in parts], [targets[part] for part in parts])
    losses = [loss_of(classifier, features[part], mask[part], targets[part]) for part in parts]
    torch.testing.assert_close(torch.stack(losses).mean(), whole)
    # a step that is not announced counts itself
    torch.testing.assert_close(loss_of(classifier, features, mask, targets), whole)


def test_detections_span_the_clip_and_hold_every_class() -> None:
    classifier, (features, mask) = head().eval(), inputs()
    found = classifier(features, mask)
    assert isinstance(found, list)
    for detections, clip, valid in zip(found, features, mask, strict=True):
        logits = classifier.linear(clip[:, valid].mean(dim=1))
        torch.testing.assert_close(detections.scores, logits.softmax(0).sort(descending=True)[0])
        assert detections.labels.tolist() == logits.argsort(descending=True).tolist()
        assert detections.segments.tolist() == [[-0.5, int(valid.sum()) - 0.5]] * 5


def test_dropout_is_for_training_only() -> None:
    classifier, (features, mask) = head(dropout=0.5), inputs()
    one, other = (classifier.predict(features, mask)[0] for _ in range(2))
    assert not torch.equal(one, other)
    classifier.eval()
    one, other = (classifier.predict(features, mask)[0] for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["dropout", "label_smoothing"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"ClipClassifierConfig.{name} must be in \[0, 1\)"):
        ClipClassifierConfig(**{name: 1.0})


def spec() -> DetectorSpec:
    return DetectorSpec(
        classes=("fly", "spin", "walk"),
        backbone=replace(swin_toy(), embed_dim=16, heads=(2, 2)),
        localizer=ClipClassifierConfig(),
        size=32,
        window=WindowConfig(frames=8, fps=4.0),
    )


def test_a_classifier_is_saved_with_all_that_it_needs_and_loads_strictly(tmp_path: Path) -> None:
    built = spec()
    classifier = built.build().eval()
    frames = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    save_detector(tmp_path, built, classifier)
    read, loaded = load_detector(tmp_path)
    assert read == built
    with torch.no_grad():
        scores = class_scores(loaded, frames, mask)
        assert torch.equal(scores, class_scores(classifier, frames, mask))
    assert scores.shape == (2, 3)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(2))
    other = replace(built, classes=("fly", "spin")).build()
    save_detector(tmp_path, built, other)
    with pytest.raises(UserError, match=r"localizer\.linear"):
        load_detector(tmp_path)


def slow_top_k(scores: Tensor, labels: Tensor, k: int) -> list[bool]:
    """By sorting each sample's classes."""
    right = []
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        right.append(label in order[:k])
    return right


@pytest.mark.parametrize("levels", [3, 10**6])
def test_accuracies_are_those_of_sorting(levels: int) -> None:
    random = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (200, 7), generator=random).float()  # 3 levels: many ties
    labels = torch.randint(6, (200,), generator=random)  # class 6 has no sample
    for k in (1, 5):
        right = slow_top_k(scores, labels, k)
        assert top_k_accuracy(scores, labels, k) == pytest.approx(sum(right) / 200)
    best = slow_top_k(scores, labels, 1)
    shares = []
    for label in range(6):
        of_class = [r for r, found in zip(best, labels.tolist(), strict=True) if found == label]
        shares.append(sum(of_class) / len(of_class))
    assert mean_class_accuracy(scores, labels) == pytest.approx(sum(shares) / 6)


def test_equal_scores_are_no_better_than_chance_and_nan_is_refused() -> None:
    labels = torch.arange(10)
    assert top_k_accuracy(torch.zeros(10, 10), labels, 1) == pytest.approx(0.1)
    assert top_k_accuracy(torch.zeros(10, 10), labels, 5) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="finite"):
        top_k_accuracy(torch.full((1, 3), float("nan")), torch.tensor([0]), 1)
