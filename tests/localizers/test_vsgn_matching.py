"""VSGN's anchors, matching, losses and boundaries, against slow definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from re2tal.localizers.protocol import Instances
from re2tal.localizers.vsgn.heads import BoundaryAdjustment, log_interpolated
from re2tal.localizers.vsgn.matching import (
    GREATEST_GROWTH,
    anchors_of_nodes,
    make_anchors,
    match,
    score_losses,
    score_targets,
)

CPU = torch.device("cpu")
# Three samples with two, one and no actions; the second of the first is met by no anchor well.
INSTANCES = Instances(
    segments=torch.tensor(
        [
            [[1.5, 6.0], [20.2, 20.9], [8.0, 30.0]],
            [[3.5, 11.5], [0.0, 0.0], [0.0, 0.0]],
            [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
        ]
    ),
    labels=torch.tensor([[0, 3, 1], [2, -1, -1], [-1, -1, -1]]),
)


def test_anchors_lie_where_the_release_has_them() -> None:
    anchors = make_anchors(16, (4, 8), (1.0, 1.5), CPU)
    assert anchors.centres.tolist() == [2, 2, 6, 6, 10, 10, 14, 14, 4, 4, 12, 12]
    assert anchors.lengths.tolist() == [4, 6] * 4 + [8, 12] * 2
    assert anchors.segments[9].tolist() == [-2, 10]
    nodes = [anchors.centres[:8:2][None], anchors.centres[8::2][None]]
    assert torch.equal(anchors_of_nodes(nodes, 2)[0], anchors.centres)


def test_decoding_is_the_inverse_of_encoding() -> None:
    torch.manual_seed(0)
    anchors = make_anchors(32, (4, 8, 16), (1.0, 1.5), CPU)
    start = 32 * torch.rand(3, 28)
    segments = torch.stack([start, start + 0.1 + 30 * torch.rand(3, 28)], dim=2)
    shift = 10 * (segments.mean(dim=2) - anchors.centres) / anchors.lengths
    growth = 5 * ((segments[..., 1] - segments[..., 0]) / anchors.lengths).log()
    decoded = anchors.decode(torch.stack([shift, growth], dim=2))
    torch.testing.assert_close(decoded, segments, atol=1e-4, rtol=1e-5)
    huge = anchors.decode(torch.full((1, 28, 2), 1e3)).diff(dim=2)[0, :, 0]
    assert math.log(62.5) == GREATEST_GROWTH
    torch.testing.assert_close(huge, 62.5 * anchors.lengths, atol=1e-3, rtol=1e-4)


def overlap(a: list[float], b: list[float]) -> float:
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return shared / (a[1] - a[0] + b[1] - b[0] - shared)


def slow_match(segments: Tensor, valid: Tensor, threshold: float) -> list[list[int]]:
    """Number of the action of each sample and anchor, or -1."""
    matched = []
    for sample, labels in enumerate(INSTANCES.labels.tolist()):
        actions = [n for n, label in enumerate(labels) if label >= 0]
        table = [
            [
                overlap(segment, INSTANCES.segments[sample, n].tolist()) if inside else 0.0
                for n in actions
            ]
            for segment, inside in zip(
                segments[sample].tolist(), valid[sample].tolist(), strict=True
            )
        ]
        best = [max(column) for column in zip(*table, strict=True)]
        row = []
        for overlaps in table:
            top = max(overlaps, default=0.0)
            unsurpassed = any(o == b and b > 0 for o, b in zip(overlaps, best, strict=True))
            positive = top > 0 and (top >= threshold or unsurpassed)
            row.append(actions[overlaps.index(top)] if positive else -1)
        matched.append(row)
    return matched


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_matching_is_that_of_the_definition(threshold: float) -> None:
    torch.manual_seed(1)
    anchors = make_anchors(32, (2, 4, 8), (1.0, 1.5), CPU)
    jitter = anchors.segments + torch.rand(3, 56, 2).double() - 0.5
    for segments in (anchors.segments.double().expand(3, -1, -1), jitter):
        valid = torch.rand(3, 56) < 0.8
        found = match(segments, valid, INSTANCES, threshold)
        expected = slow_match(segments, valid, threshold)
        for sample, row in enumerate(expected):
            for anchor, action in enumerate(row):
                label = INSTANCES.labels[sample, action].item() + 1 if action >= 0 else 0
                assert found.classes[sample, anchor].item() == label
                if action >= 0:
                    wanted = INSTANCES.segments[sample, action]
                    assert torch.equal(found.segments[sample, anchor].float(), wanted)
        assert {0, 1, 2, 4} <= set(found.classes[0].tolist())  # the badly met one too
        assert not found.positive[2].any()
        assert not found.positive[~valid].any()


def test_ties_for_an_action_are_all_positive_and_what_overlaps_nothing_is_not() -> None:
    instances = Instances(
        segments=torch.tensor([[[10.0, 11.0], [50.0, 60.0]]]), labels=torch.tensor([[0, 1]])
    )
    segments = torch.tensor([[[8.0, 18.0], [3.0, 13.0], [9.0, 30.0], [20.0, 30.0]]])
    found = match(segments, torch.ones(1, 4, dtype=torch.bool), instances, 0.5)
    assert found.classes.tolist() == [[1, 1, 0, 0]]


def test_score_targets_are_those_of_the_definition() -> None:
    targets = score_targets(INSTANCES, 32)
    for sample, feature in torch.ones(3, 32).nonzero().tolist():
        cell = feature - 0.5, feature + 0.5
        expected = [False] * 3
        for (start, end), label in zip(
            INSTANCES.segments[sample].tolist(), INSTANCES.labels[sample].tolist(), strict=True
        ):
            if label < 0:
                continue
            regions = (start - 1.5, start + 1.5), (end - 1.5, end + 1.5), (start, end)
            for i, (left, right) in enumerate(regions):
                shared = min(cell[1], right) - max(cell[0], left)
                expected[i] |= round(shared, 5) > 0.5
        assert targets[sample, :, feature].tolist() == expected
    # In time turned round starts are ends.
    turned = Instances(segments=31 - INSTANCES.segments.flip(2), labels=INSTANCES.labels)
    assert torch.equal(score_targets(turned, 32).flip(2)[:, [1, 0, 2]], targets)


def test_score_losses_weigh_positives_and_negatives_the_same() -> None:
    """The published formula, with the weights that make it so."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(2, 3, 20)
    targets = torch.rand(2, 3, 20) < 0.3
    mask = torch.rand(2, 20) < 0.8
    losses = score_losses(F.logsigmoid(logits), F.logsigmoid(-logits), targets, mask)
    for i, name in enumerate(("start", "end", "action")):
        p, g = logits[:, i][mask].sigmoid(), targets[:, i][mask].float()
        ratio = len(g) / g.sum()
        each = ratio / 2 * g * p.log() + ratio / (ratio - 1) / 2 * (1 - g) * (1 - p).log()
        assert losses[name].item() == pytest.approx(-each.mean().item(), rel=1e-5)
    extreme = torch.full((1, 3, 4), 200.0, requires_grad=True)
    no = log_interpolated(F.logsigmoid(-extreme), 8)
    nothing = torch.zeros(1, 3, 8, dtype=torch.bool)
    wrong = score_losses(log_interpolated(F.logsigmoid(extreme), 8), no, nothing, ~nothing[:, 0])
    assert wrong["start"].item() == pytest.approx(100)  # half of 200: no logarithm was cut off
    sum(wrong.values(), torch.zeros(())).backward()
    assert extreme.grad is not None
    assert extreme.grad.sum().item() == pytest.approx(1.5)


def test_boundaries_pass_the_gradient_of_segments_on() -> None:
    torch.manual_seed(0)
    start = 40 * torch.rand(2, 30) - 8
    segments = torch.stack([start, start + 30 * torch.rand(2, 30)], dim=2).requires_grad_()
    adjusted = BoundaryAdjustment(6, stride=4)(segments, torch.randn(2, 6, 8))
    (gradient,) = torch.autograd.grad(adjusted.sum(), segments)
    assert gradient.eq(1).all()
