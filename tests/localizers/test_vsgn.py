"""VSGN: padding, anchors, windows of few features, and what its losses follow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from re2tal.localizers import Targets
from re2tal.localizers.vsgn import VSGNConfig
from re2tal.localizers.vsgn.heads import boundary_scores, inside_window
from tests.localizers.small import NOTHING, VSGN, built, sample, stitched

EVERYTHING = replace(VSGN, score_threshold=-1.0, min_duration=-100.0, top_k=10**6)


@pytest.mark.parametrize("stem_stride", [1, 2])
@pytest.mark.parametrize("graph", [True, False])
def test_the_amount_of_padding_changes_nothing(stem_stride: int, graph: bool) -> None:
    """Layers see zeros behind the last feature, as they do behind a window's end."""
    model = built(replace(VSGN, stem_stride=stem_stride, graph=graph))
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


def test_a_stitched_window_is_known_by_its_mask() -> None:
    """Edges across change what is found, even where no padded feature is in reach."""
    features, _ = sample([32])
    features[..., 9:12] = 0
    mask = torch.ones(1, 32, dtype=torch.bool)
    gap = mask.clone()
    gap[:, 9:12] = False
    model = built(replace(VSGN, levels=2))
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
    few = built(replace(VSGN, score_threshold=threshold, min_duration=shortest, top_k=20))
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


def test_classes_follow_where_anchors_are_moved_to() -> None:
    """Moved onto the action, every anchor is its positive, wherever it started."""
    model = built(VSGN)
    features, mask = sample([32])
    action = Targets(segments=torch.tensor([[8.0, 20.0]]), labels=torch.tensor([2]))
    predicted = model.predict(features, mask)
    onto = torch.tensor([8.5, 20.0]).expand_as(predicted.segments).clone().requires_grad_()
    logits = torch.zeros_like(predicted.logits)
    logits[..., 3] = 10.0
    losses = model.losses(
        predicted._replace(segments=onto, adjusted=onto + 0.25, logits=logits), [action]
    )
    assert losses["classification"] < 1e-3
    assert losses["regression"].item() == pytest.approx(0.5 / 12)
    # 8.75 to 20.25 against 8 to 20: 11.25 of 12.25 in common.
    assert losses["adjustment"].item() == pytest.approx(1 - 11.25 / 12.25)
    (gradient,) = torch.autograd.grad(losses["adjustment"], onto)
    assert gradient.any()  # the adjustment trains the regression, too
    partly = onto.detach().clone()
    partly[:, ::2] = torch.tensor([8.0, 15.5])  # overlaps enough to be classified, not adjusted
    losses = model.losses(
        predicted._replace(segments=partly, adjusted=partly, logits=logits), [action]
    )
    assert losses["classification"] < 1e-3
    assert losses["adjustment"].item() == pytest.approx(0.5 / 12)
    heavier = built(replace(VSGN, supplementary_weight=0.4))
    more, less = heavier(features, mask, [action]), model(features, mask, [action])
    for term in more:
        factor = 2.0 if term in ("start", "end", "action") else 1.0
        torch.testing.assert_close(more[term], factor * less[term])


def test_without_classes_it_makes_proposals() -> None:
    model = built(VSGN, classes=1)
    features, mask = sample([32, 20])
    action = Targets(segments=torch.tensor([[8.0, 20.0]]), labels=torch.tensor([0]))
    assert all(loss.isfinite() for loss in model(features, mask, [action, NOTHING]).values())
    assert model.predict(features, mask).logits.shape[2] == 2
    assert all(len(f) > 0 and not f.labels.any() for f in model(features, mask))


def test_the_published_configuration_has_the_published_number_of_parameters() -> None:
    """Counted once in the authors' release, with its settings for THUMOS-14."""
    with torch.device("meta"):
        published = VSGNConfig().build(2048, 20)
        plain = VSGNConfig(graph=False).build(2048, 20)
    assert sum(p.numel() for p in published.parameters()) == 8_373_299
    assert sum(p.numel() for p in plain.parameters()) == 7_716_659
    assert published.pyramid.strides == (4, 8, 16, 32, 64)
