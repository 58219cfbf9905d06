from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from re2tal.localizers.losses import (
    LossNormalizer,
    balanced_cross_entropy,
    diou_loss,
    divide_alike,
    giou_loss,
    loss_parts,
)
from tests.ranks import Ranks


def test_points_that_are_not_positive_get_no_gradient_whatever_they_hold() -> None:
    predicted = torch.zeros(3, 2, requires_grad=True)
    actual = torch.tensor([[1.0, 2.0], [-5.0, 3.0], [0.0, 0.0]])
    diou_loss(predicted, actual, torch.tensor([True, False, False])).backward()
    assert predicted.grad is not None
    assert predicted.grad[1:].eq(0).all()
    assert predicted.grad.isfinite().all()
    nothing = diou_loss(predicted, actual, torch.zeros(3, dtype=torch.bool))
    assert nothing.item() == 0


def test_cross_entropy_weighs_positives_and_negatives_the_same() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 9, 4)
    classes = torch.randint(0, 4, (2, 9))
    valid = torch.rand(2, 9) < 0.7
    losses: dict[bool, list[float]] = {True: [], False: []}
    for b, a in valid.nonzero().tolist():
        exponentials = [math.exp(x) for x in logits[b, a].tolist()]
        share = exponentials[int(classes[b, a])] / sum(exponentials)
        losses[bool(classes[b, a] > 0)].append(-math.log(share))
    expected = sum(sum(part) / len(part) for part in losses.values())
    actual = balanced_cross_entropy(logits, classes, valid)
    assert actual.item() == pytest.approx(expected, rel=1e-5)
    only = sum(losses[False]) / len(losses[False])
    without = balanced_cross_entropy(logits, classes, valid & (classes == 0))
    assert without.item() == pytest.approx(only, rel=1e-5)
    assert balanced_cross_entropy(logits, classes, torch.zeros_like(valid)).item() == 0
    assert balanced_cross_entropy(logits, classes.clamp(min=1), valid).isfinite()


def slow_giou(a: list[float], b: list[float]) -> float:
    a = sorted(a)
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = a[1] - a[0] + b[1] - b[0] - shared
    around = max(a[1], b[1]) - min(a[0], b[0])
    return 1 - (shared / union - (around - union) / around)


def test_giou_loss_is_a_mean_over_positives() -> None:
    torch.manual_seed(0)
    predicted = 10 * torch.rand(3, 8, 2)  # some of them turned round
    actual = (10 * torch.rand(3, 8, 2)).sort(dim=2).values
    positive = torch.rand(3, 8) < 0.6
    pairs = [
        slow_giou(predicted[b, a].tolist(), actual[b, a].tolist())
        for b, a in positive.nonzero().tolist()
    ]
    assert max(pairs) > 1 > min(pairs) > 0  # apart and overlapping ones
    loss = giou_loss(predicted, actual, positive)
    assert loss.item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_pairs_that_are_not_positive_get_no_gradient_whatever_they_hold() -> None:
    predicted = torch.tensor([[2.0, 2.0], [1.0, 4.0], [5.0, 3.0]], requires_grad=True)
    actual = torch.tensor([[2.0, 2.0], [2.0, 4.0], [-1e9, 1e9]])
    giou_loss(predicted, actual, torch.tensor([False, True, False])).backward()
    assert predicted.grad is not None
    assert predicted.grad[1].any()
    assert not predicted.grad[[0, 2]].any()
    assert giou_loss(predicted, actual, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_a_copy_that_took_no_step_divides_its_losses_alike() -> None:
    original, copy = LossNormalizer(100.0), LossNormalizer(100.0).eval()
    original.count(torch.tensor(50.0), passes=4)
    assert float(copy(torch.tensor(1.0))) == 100.0
    divide_alike(nn.Sequential(copy), loss_parts(nn.Sequential(original)))
    assert float(copy(torch.tensor(1.0))) == 25.0


def test_the_normalizer_follows_the_batches_when_training_only() -> None:
    normalizer = LossNormalizer(100.0)
    assert normalizer(torch.tensor(20)).item() == pytest.approx(0.9 * 100 + 0.1 * 20)
    assert normalizer(torch.tensor(0)).item() == pytest.approx(0.9 * 92 + 0.1 * 1)
    normalizer.eval()
    assert normalizer(torch.tensor(50)).item() == pytest.approx(82.9)
    resumed = LossNormalizer(1.0)
    resumed.load_state_dict(normalizer.state_dict())
    assert resumed.eval()(torch.tensor(0)).item() == pytest.approx(82.9)


def test_two_batches_may_be_differentiated_together() -> None:
    normalizer = LossNormalizer(100.0)
    weight = torch.ones((), requires_grad=True)
    terms = [weight / normalizer(torch.tensor(20)) for _ in range(2)]
    sum(terms, torch.zeros(())).backward()
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(1 / 92 + 1 / 84.8)


def _count_on_rank(rank: int) -> None:
    mean = LossNormalizer(100.0)(torch.tensor([20, 40][rank]))
    # the mean is that of both ranks' sum, and each rank's pass is half of the step
    assert mean.item() == pytest.approx((0.9 * 100 + 0.1 * 60) / 2)


@pytest.mark.slow
def test_all_ranks_divide_by_the_same_mean(ranks: Ranks) -> None:
    ranks.run(_count_on_rank)


def test_a_step_is_counted_once_ahead_of_its_passes() -> None:
    normalizer = LossNormalizer(100.0)
    normalizer.count(torch.tensor(60), passes=3)
    divisors = [normalizer(torch.tensor(20)).item() for _ in range(3)]
    assert divisors == pytest.approx([96 / 3] * 3)
    # the next pass that nobody has announced is a step of its own
    assert normalizer(torch.tensor(50)).item() == pytest.approx(0.9 * 96 + 0.1 * 50)
