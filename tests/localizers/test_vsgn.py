"""VSGN as a localizer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from re2tal.detection import Detections
from re2tal.localizers import Localizer, Targets
from re2tal.localizers.protocol import LocalizerConfig
from re2tal.localizers.vsgn import VSGN, VSGNConfig
from re2tal.localizers.vsgn.heads import boundary_scores, inside_window
from tests.localizers.learning import learnt

SMALL = VSGNConfig(width=16, levels=3, stem_stride=1, neighbours=4, head_layers=2)
EVERYTHING = replace(SMALL, score_threshold=-1.0, min_duration=-100.0, top_k=10**6)
NOTHING = Targets(segments=torch.zeros(0, 2), labels=torch.zeros(0, dtype=torch.int64))
ACTIONS = [
    Targets(segments=torch.tensor([[2.0, 6.5], [8.0, 20.0]]), labels=torch.tensor([1, 3])),
    NOTHING,
]
LOSSES = {"classification", "regression", "adjustment", "start", "end", "action"}


def built(config: VSGNConfig = SMALL, classes: int = 4) -> VSGN:
    """A localizer for 6 channels whose parameters are all away from their start."""
    torch.manual_seed(0)
    model = config.build(6, classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def sample(lengths: list[int]) -> tuple[Tensor, Tensor]:
    features = torch.randn(len(lengths), 6, 32, generator=torch.Generator().manual_seed(1))
    return features, torch.arange(32)[None] < torch.tensor(lengths)[:, None]


def stitched() -> tuple[Tensor, Tensor]:
    """A whole window, and a clip of 9 features, a gap of 3 and the clip's copy."""
    features, mask = sample([32, 32])
    mask[1, 9:12] = False
    return features, mask


def same(a: Detections, b: Detections) -> bool:
    return (
        torch.equal(a.segments, b.segments)
        and torch.equal(a.scores, b.scores)
        and torch.equal(a.labels, b.labels)
    )


@pytest.mark.parametrize("graph", [True, False])
def test_it_is_a_localizer(graph: bool) -> None:
    config: LocalizerConfig = replace(SMALL, graph=graph)
    assert isinstance(config, LocalizerConfig)
    localizer: Localizer = config.build(6, 4)
    features, mask = sample([32, 20])
    losses = localizer(features, mask, ACTIONS)
    assert isinstance(losses, dict)
    assert set(losses) == LOSSES
    assert all(loss.shape == () and loss > 0 for loss in losses.values())
    found = localizer(features, mask)
    assert isinstance(found, list)
    assert [type(f) for f in found] == [Detections, Detections]


def test_what_the_padding_holds_changes_nothing() -> None:
    model = built()
    for features, mask in (sample([32, 21]), stitched(), sample([3, 0])):
        filled = features.masked_fill(~mask[:, None], torch.nan)
        other = features.masked_fill(~mask[:, None], 1e4)
        for a, b in zip(model(filled, mask), model(other, mask), strict=True):
            assert same(a, b)
        losses, others = model(filled, mask, ACTIONS), model(other, mask, ACTIONS)
        assert all(torch.equal(losses[term], others[term]) for term in losses)
        assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("stem_stride", [1, 2])
@pytest.mark.parametrize("graph", [True, False])
def test_how_much_padding_follows_changes_nothing(stem_stride: int, graph: bool) -> None:
    """Layers see zeros behind the last feature, as they do behind a window's end."""
    model = built(replace(SMALL, stem_stride=stem_stride, graph=graph))
    features, mask = sample([32])
    padded, longer = torch.cat([features, features], dim=2), torch.cat([mask, ~mask], dim=1)
    short, long = model.predict(features, mask), model.predict(padded, longer)
    for name in ("logits", "segments"):
        alone, behind = getattr(short, name)[short.valid], getattr(long, name)[long.valid]
        torch.testing.assert_close(behind, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_anchors_of_cells_without_a_feature_detect_nothing(stem_stride: int) -> None:
    model = built(replace(EVERYTHING, stem_stride=stem_stride))
    for features, mask in (sample([32, 9]), stitched(), sample([0, 32]), sample([1, 2])):
        valid = model.predict(features, mask).valid
        for i, found in enumerate(model(features, mask)):
            inside = [
                bool(mask[i, first : first + stride].any())
                for stride in model.pyramid.strides
                for first in range(0, 32, stride)
                for _ in model.config.anchor_scales
            ]
            assert valid[i].tolist() == inside
            assert len(found) == 4 * sum(inside)


@pytest.mark.parametrize("length", [1, 2])
def test_a_window_of_few_features_is_trained_on_and_searched(length: int) -> None:
    """Fewer than half of what the finest node has, whose middle then is padding."""
    model = built(replace(EVERYTHING, stem_stride=2))
    features, mask = sample([length])
    action = Targets(segments=torch.tensor([[-0.5, length - 0.5]]), labels=torch.tensor([1]))
    losses = model(features, mask, [action])
    assert all(losses[name] > 0 for name in ("classification", "regression", "adjustment"))
    assert len(model(features, mask)[0]) == 4 * 2 * 3  # classes, scales, one node a level


def test_a_sample_does_not_depend_on_the_batch() -> None:
    model = built()
    for features, mask in (sample([32, 20]), stitched()):
        alone = model(features[1:], mask[1:])[0]
        assert len(alone) > 0
        both = model(features, mask)[1]
        torch.testing.assert_close(both.scores, alone.scores)
        torch.testing.assert_close(both.segments, alone.segments)


def test_a_stitched_window_is_known_by_its_mask() -> None:
    """Edges across change what is found, even where no padded feature is in reach."""
    features, _ = sample([32])
    features[..., 9:12] = 0
    mask = torch.ones(1, 32, dtype=torch.bool)
    gap = mask.clone()
    gap[:, 9:12] = False
    model = built(replace(SMALL, levels=2))
    levels, gapped = model.pyramid(features, mask)[0], model.pyramid(features, gap)[0]
    assert not torch.allclose(levels[0][..., -3:], gapped[0][..., -3:])


def test_detections_are_the_best_anchors_of_each_class() -> None:
    features, mask = sample([32, 18])
    with torch.no_grad():
        predicted = built(EVERYTHING).predict(features, mask)
    adjusted = inside_window(predicted.adjusted, 32)
    probability = predicted.logits.softmax(dim=2)
    quality = boundary_scores(predicted.yes, adjusted)
    threshold, shortest = 0.2, 2.5
    few = built(replace(SMALL, score_threshold=threshold, min_duration=shortest, top_k=20))
    for i, found in enumerate(few(features, mask)):
        rows = []
        for a, (start, end) in enumerate(adjusted[i].tolist()):
            for label in range(4):
                share = float(probability[i, a, label + 1])
                if predicted.valid[i, a] and share > threshold and end - start > shortest:
                    rows.append((share * float(quality[i, a]), start, end, label))
        rows.sort(reverse=True)
        assert len(rows) > 20 >= len(found) == len(rows[:20])
        table = torch.tensor(rows[:20])
        torch.testing.assert_close(found.scores, table[:, 0])
        torch.testing.assert_close(found.segments, table[:, 1:3])
        assert torch.equal(found.labels, table[:, 3].long())
    lowest, highest = adjusted.amin(), adjusted.amax()
    assert lowest == -0.5
    assert highest == 31.5


@pytest.mark.parametrize("graph", [True, False])
def test_every_parameter_learns_and_batches_without_actions_are_harmless(graph: bool) -> None:
    model = built(replace(SMALL, graph=graph)).train()
    # Whole windows and stitched ones, and a batch of padding alone.
    cases = [
        (*stitched(), ACTIONS),
        (*sample([32, 20]), [NOTHING, NOTHING]),
        (*sample([0, 0]), ACTIONS),
    ]
    for features, mask, targets in cases:
        model.zero_grad()
        losses = model(features.requires_grad_(), mask, targets)
        sum(losses.values(), torch.zeros(())).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert targets is not ACTIONS or not mask.any() or parameter.grad.any(), name
        assert features.grad is not None
        assert not features.grad.masked_select(~mask[:, None]).any()
        if targets is not ACTIONS or not mask.any():
            assert losses["regression"].item() == losses["adjustment"].item() == 0


def test_classes_follow_where_anchors_are_moved_to() -> None:
    """Moved onto the action, every anchor is its positive, wherever it started."""
    model = built()
    features, mask = sample([32])
    action = Targets(segments=torch.tensor([[8.0, 20.0]]), labels=torch.tensor([2]))
    predicted = model.predict(features, mask)
    onto = torch.tensor([8.5, 20.0]).expand_as(predicted.segments).clone().requires_grad_()
    logits = torch.zeros_like(predicted.logits)
    logits[..., 3] = 10.0
    losses = model._losses(
        predicted._replace(segments=onto, adjusted=onto + 0.25, logits=logits), mask, [action]
    )
    assert losses["classification"] < 1e-3
    assert losses["regression"].item() == pytest.approx(0.5 / 12)
    # 8.75 to 20.25 against 8 to 20: 11.25 of 12.25 in common.
    assert losses["adjustment"].item() == pytest.approx(1 - 11.25 / 12.25)
    (gradient,) = torch.autograd.grad(losses["adjustment"], onto)
    assert gradient.any()  # the adjustment trains the regression, too
    partly = onto.detach().clone()
    partly[:, ::2] = torch.tensor([8.0, 15.5])  # overlaps enough to be classified, not adjusted
    losses = model._losses(
        predicted._replace(segments=partly, adjusted=partly, logits=logits), mask, [action]
    )
    assert losses["classification"] < 1e-3
    assert losses["adjustment"].item() == pytest.approx(0.5 / 12)
    heavier = built(replace(SMALL, supplementary_weight=0.4))
    more, less = heavier(features, mask, [action]), model(features, mask, [action])
    for term in LOSSES:
        factor = 2.0 if term in ("start", "end", "action") else 1.0
        torch.testing.assert_close(more[term], factor * less[term])


def test_half_precision_inside_gives_float32_outside() -> None:
    model = built()
    features, mask = sample([32, 20])
    exact = model(features, mask, ACTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(features.bfloat16(), mask, ACTIONS)
        found = model(features.bfloat16(), mask)
    for term, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[term].item(), rel=0.1)
    sum(losses.values(), torch.zeros(())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert found[0].scores.dtype == found[0].segments.dtype == torch.float32


def test_without_classes_it_makes_proposals() -> None:
    model = built(classes=1)
    features, mask = sample([32, 20])
    action = Targets(segments=torch.tensor([[8.0, 20.0]]), labels=torch.tensor([0]))
    assert set(model(features, mask, [action, NOTHING])) == LOSSES
    assert model.predict(features, mask).logits.shape[2] == 2
    assert all(len(f) > 0 and not f.labels.any() for f in model(features, mask))


def test_input_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"30 features.*multiple of 8"):
        built()(torch.zeros(1, 6, 30), torch.ones(1, 30, dtype=torch.bool))
    unknown = Targets(segments=torch.ones(1, 2), labels=torch.tensor([4]))
    with pytest.raises(ValueError, match="label 4"):
        built()(*sample([32, 32]), [unknown, NOTHING])


def planted(count: int, seed: int) -> tuple[Tensor, list[Targets]]:
    """Noise of 64 steps with two actions, each a pattern of its class."""
    generator = torch.Generator().manual_seed(seed)
    features = 0.3 * torch.randn(count, 6, 64, generator=generator)
    targets = []
    for window in features:
        segments, labels = [], []
        for first in (1, 33):
            length = int(torch.randint(3, 26, (), generator=generator))
            start = first + int(torch.randint(0, 28 - length, (), generator=generator))
            label = int(torch.randint(0, 2, (), generator=generator))
            window[label, start : start + length] += 2
            segments.append([start - 0.5, start + length - 0.5])
            labels.append(label)
        targets.append(Targets(segments=torch.tensor(segments), labels=torch.tensor(labels)))
    return features, targets


@pytest.mark.slow
def test_it_learns_planted_segments() -> None:
    torch.manual_seed(0)
    config = VSGNConfig(width=32, levels=4, stem_stride=1, neighbours=6, head_layers=2)
    assert learnt(config.build(6, 2), planted, rate=4e-3, steps=35) > 0.8
