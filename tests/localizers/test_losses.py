from __future__ import annotations

import math

import pytest
import torch

from re2tal.localizers.losses import LossNormalizer, diou_loss, focal_loss
from tests.ranks import Ranks


def slow_focal(logit: float, target: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    right = p * target + (1 - p) * (1 - target)
    weight = 0.25 * target + 0.75 * (1 - target)
    entropy = -target * math.log(p) - (1 - target) * math.log(1 - p)
    return weight * (1 - right) ** 2 * entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_loss_sums_over_valid_points(smoothing: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 3) * 3
    classes = (torch.rand(2, 5, 3) < 0.4).float()
    valid = torch.rand(2, 5) < 0.7
    expected = sum(
        slow_focal(float(logit), float(target) * (1 - smoothing) + smoothing / 4)
        for point, kinds, counts in zip(
            logits.view(10, 3), classes.view(10, 3), valid.view(10), strict=True
        )
        if counts
        for logit, target in zip(point, kinds, strict=True)
    )
    actual = focal_loss(logits, classes, valid, smoothing=smoothing)
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def slow_diou(predicted: list[float], actual: list[float]) -> float:
    """From the two segments around the point 10."""
    a, b = 10 - predicted[0], 10 + predicted[1]
    c, d = 10 - actual[0], 10 + actual[1]
    shared = max(min(b, d) - max(a, c), 0)
    overlap = shared / (b - a + d - c - shared)
    centres = (a + b) / 2 - (c + d) / 2
    return 1 - overlap + (centres / (max(b, d) - min(a, c))) ** 2


def test_diou_loss_sums_over_positive_points() -> None:
    torch.manual_seed(0)
    predicted, actual = torch.rand(2, 4, 6, 2) * 3
    positive = torch.rand(4, 6) < 0.5
    expected = sum(
        slow_diou(predicted[b, p].tolist(), actual[b, p].tolist())
        for b, p in positive.nonzero().tolist()
    )
    assert diou_loss(predicted, actual, positive).item() == pytest.approx(expected, rel=1e-5)


def test_points_that_are_not_positive_get_no_gradient_whatever_they_hold() -> None:
    predicted = torch.zeros(3, 2, requires_grad=True)
    actual = torch.tensor([[1.0, 2.0], [-5.0, 3.0], [0.0, 0.0]])
    diou_loss(predicted, actual, torch.tensor([True, False, False])).backward()
    assert predicted.grad is not None
    assert predicted.grad[1:].eq(0).all()
    assert predicted.grad.isfinite().all()
    nothing = diou_loss(predicted, actual, torch.zeros(3, dtype=torch.bool))
    assert nothing.item() == 0


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


def test_what_a_step_holds_is_counted_once_ahead_of_its_passes() -> None:
    normalizer = LossNormalizer(100.0)
    normalizer.count(torch.tensor(60), passes=3)
    divisors = [normalizer(torch.tensor(20)).item() for _ in range(3)]
    assert divisors == pytest.approx([96 / 3] * 3)
    # the next pass that nobody has announced is a step of its own
    assert normalizer(torch.tensor(50)).item() == pytest.approx(0.9 * 96 + 0.1 * 50)
