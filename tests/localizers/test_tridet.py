"""TriDet: SGP layers, trident head and losses against slow definitions; padding; its start."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from re2tal.localizers import Targets, TriDetConfig
from re2tal.localizers.points import assign, make_points
from re2tal.localizers.tridet import GROUPS, SGPLayer, boundary_distances
from tests.localizers.small import ACTIONS, TRIDET, built, sample

Row = list[float]


def layer(config: Any = TRIDET, *, halves: bool) -> SGPLayer:
    """An SGP layer in double precision whose parameters are all away from their start."""
    torch.manual_seed(0)
    made = SGPLayer(config, halves=halves).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def slow_filter(filters: Any, rows: list[Row], step: int, channel: int) -> float:
    """Value of one channel's filter around one step, with zeros beyond the ends."""
    weights = filters.weight[channel, 0].tolist()
    total: float = filters.bias[channel].item()
    for tap, weight in enumerate(weights):
        place = step + tap - len(weights) // 2
        if 0 <= place < len(rows):
            total += weight * rows[place][channel]
    return total


def slow_norm(values: Row) -> Row:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / math.sqrt(variance + 1e-5) for value in values]


def slow_sgp(sgp: SGPLayer, rows: list[Row]) -> list[Row]:
    """The layer on the steps of one video without padding, one number at a time."""
    channels = len(rows[0])
    if sgp.halves:
        rows = [
            [max(row[c] for row in rows[max(0, t - 1) : t + 2]) for c in range(channels)]
            for t in range(0, len(rows), 2)
        ]
    weight, bias = sgp.norm.weight.tolist(), sgp.norm.bias.tolist()
    normed = [
        [weight[c] * value + bias[c] for c, value in enumerate(slow_norm(row))] for row in rows
    ]
    mean = [[sum(row[c] for row in normed) / len(normed) for c in range(channels)]]
    factors = [
        getattr(scale, "scale", torch.ones(channels)).tolist()
        for scale in (sgp.scale_mixed, sgp.scale_mlp)
    ]
    mixed: list[Row] = []
    for t, row in enumerate(rows):
        mixed.append([])
        for c in range(channels):
            gate = max(0.0, slow_filter(sgp.video_gate, mean, 0, c))
            wide = slow_filter(sgp.wide, normed, t, c) + slow_filter(sgp.narrow, normed, t, c)
            value = slow_filter(sgp.instant, normed, t, c) * gate
            value += wide * slow_filter(sgp.window_gate, normed, t, c) + normed[t][c]
            mixed[-1].append(row[c] + factors[0][c] * value)
    size = channels // GROUPS
    grouped = [[0.0] * channels for _ in mixed]
    for group in range(GROUPS):
        members = range(group * size, (group + 1) * size)
        values = iter(slow_norm([row[c] for row in mixed for c in members]))
        for row in grouped:
            for c in members:
                row[c] = sgp.group_norm.weight[c].item() * next(values)
                row[c] += sgp.group_norm.bias[c].item()
    first: Any = sgp.mlp[0]
    last: Any = sgp.mlp[2]
    out = []
    for row, inner in zip(mixed, grouped, strict=True):
        hidden = [
            sum(w * x for w, x in zip(weights, inner, strict=True)) + b
            for weights, b in zip(first.weight.tolist(), first.bias.tolist(), strict=True)
        ]
        hidden = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in hidden]
        out.append(
            [
                row[c]
                + factors[1][c]
                * (sum(w * x for w, x in zip(weights, hidden, strict=True)) + last.bias[c].item())
                for c, weights in enumerate(last.weight.tolist())
            ]
        )
    return out


@pytest.mark.parametrize("halves", [False, True])
def test_sgp_is_its_definition_on_what_is_no_padding(halves: bool) -> None:
    sgp = layer(replace(TRIDET, width=32), halves=halves)
    assert sgp.wide.weight.shape[2] == (7 if halves else 3)
    assert sgp.narrow.weight.shape[2] == (3 if halves else 1)
    x = torch.randn(4, 16, 32, dtype=torch.float64)
    lengths = [16, 10, 9, 0]  # of an odd one the last maximum is at the padding
    mask = torch.arange(16) < torch.tensor(lengths)[:, None]
    x *= mask[..., None]
    found, found_mask = sgp(x, mask)
    assert torch.equal(found_mask, mask[:, ::2] if halves else mask)
    for sample_, valid, steps, length in zip(found, found_mask, x, lengths, strict=True):
        assert not sample_[~valid].any()
        if length:
            expected = torch.tensor(slow_sgp(sgp, steps[:length].tolist()), dtype=torch.float64)
            # The group norm computes in float32.
            torch.testing.assert_close(sample_[valid], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("window", "widening", "wide"), [(1, 5.0, 11), (1, 1.5, 3), (3, 1.2, 5), (15, 1.3, 21)]
)
def test_the_wide_window_is_odd(window: int, widening: float, wide: int) -> None:
    sgp = SGPLayer(replace(TRIDET, window=window, widening=widening), halves=True)
    assert sgp.wide.weight.shape[2] == wide


# The trident head


def slow_distance(boundary: Row, own: Row, at: int, direction: int) -> float:
    """Expected distance from one point to a boundary on one side; `own[d]` at distance d."""
    weights = []
    for distance, logit in enumerate(own):
        place = at + direction * distance
        score = boundary[place] if 0 <= place < len(boundary) else 0.0
        weights.append(math.exp(score + logit))
    return sum(d * weight for d, weight in enumerate(weights)) / sum(weights)


def test_boundaries_are_expected_over_the_points_of_the_level() -> None:
    torch.manual_seed(0)
    lengths, reach = (9, 4, 2), 3
    start, end = 3 * torch.randn(2, 2, 15, 5).double()
    bins = 3 * torch.randn(2, 15, 2, reach + 1).double()
    found = boundary_distances(start, end, bins, lengths)
    assert found.shape == (2, 15, 5, 2)
    assert 0 <= found.min() < 0.2
    assert reach - 0.2 < found.max() <= reach
    for b in range(2):
        for label in range(5):
            first = 0
            for length in lengths:
                level = slice(first, first + length)
                for t in range(length):
                    left, right = bins[b, first + t].tolist()
                    expected = [
                        slow_distance(start[b, level, label].tolist(), left[::-1], t, -1),
                        slow_distance(end[b, level, label].tolist(), right, t, 1),
                    ]
                    assert found[b, first + t, label].tolist() == pytest.approx(expected)
                first += length


# Losses


def slow_focal(logit: float, wanted: float) -> float:
    score = 1 / (1 + math.exp(-logit))
    entropy = -wanted * math.log(score) - (1 - wanted) * math.log(1 - score)
    missed = wanted * (1 - score) + (1 - wanted) * score
    return (0.25 * wanted + 0.75 * (1 - wanted)) * entropy * missed**2


def slow_losses(
    config: Any, logits: Tensor, offsets: Tensor, valid: Tensor, classes: Tensor, actual: Tensor
) -> tuple[float, float, int]:
    """Sums of both losses, pair by pair of point and class, and the number of positive points."""
    classification = regression = 0.0
    positive = 0
    for b, p in valid.nonzero().tolist():
        positive += bool(classes[b, p].any())
        for k in range(classes.shape[2]):
            wanted = classes[b, p, k].item()
            smoothed = wanted * (1 - config.label_smoothing)
            smoothed += config.label_smoothing / (classes.shape[2] + 1)
            loss = slow_focal(logits[b, p, k].item(), smoothed)
            if wanted:
                (left, right), (true_left, true_right) = offsets[b, p, k].tolist(), actual[b, p]
                true_left, true_right = float(true_left), float(true_right)
                shared = min(left, true_left) + min(right, true_right)
                around = max(left, true_left) + max(right, true_right)
                overlap = shared / (left + right + true_left + true_right - shared)
                apart = ((right - left) - (true_right - true_left)) / 2
                loss *= overlap**config.iou_power
                regression += 1 - overlap + (apart / around) ** 2
            classification += loss
    return classification, regression, positive


@pytest.mark.parametrize("power", [0.0, 0.2, 1.0])
def test_losses_are_their_definition(power: float) -> None:
    config = replace(TRIDET, iou_power=power, label_smoothing=0.1, regression_weight=2.0)
    model = built(config)
    features, mask = sample([32, 20])
    # Two actions of the same length share their points: pairs of a point and each of its classes.
    segments = torch.tensor([[2.0, 6.5], [8.0, 20.0], [8.0, 20.0]])
    twice = Targets(segments=segments, labels=torch.tensor([1, 3, 0]))
    targets = [twice, ACTIONS[0]]
    logits, offsets, valid, points = model.predict(features, mask)
    actual = assign(points, targets, 4, radius=1.5)
    assert (actual.classes.sum(dim=2) > 1).any()
    classification, regression, positive = slow_losses(
        config, logits, offsets, valid, actual.classes, actual.offsets
    )
    model.normalizer.train()
    losses = model(features, mask, targets)
    count = 0.9 * 100 + 0.1 * positive
    assert positive > 5
    assert model.normalizer.mean.item() == pytest.approx(count)
    assert losses["classification"].item() == pytest.approx(classification / count, rel=1e-4)
    assert losses["regression"].item() == pytest.approx(2 * regression / count, rel=1e-4)
    model.begin_step([mask, mask], [targets, targets])
    assert model.normalizer.mean.item() == pytest.approx(0.9 * count + 0.1 * 2 * positive)


def test_a_regression_that_misses_has_a_finite_gradient() -> None:
    model = built(replace(TRIDET, bins=1)).train()
    with torch.no_grad():
        # All the weight is on a distance of 0: the predicted segment is an instant.
        model.offset_head.last.weight.zero_()
        model.offset_head.last.bias.copy_(torch.tensor([-1e4, 1e4, 1e4, -1e4]))
    features, mask = sample([32, 32])
    losses = model(features, mask, ACTIONS)
    sum(losses.values(), torch.zeros(())).backward()
    assert losses["regression"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# The whole


@pytest.mark.parametrize("first", [0, 12])
def test_padding_is_as_the_end_of_the_video(first: int) -> None:
    model = built(TRIDET)
    features, mask = sample([32, 32])
    inside = slice(first, first + 20)
    mask[1] = False
    mask[1, inside] = True
    padded = model.predict(features, mask)
    alone = model.predict(features[1:, :, inside], mask[1:, inside])
    valid = padded[2][1]
    assert valid.sum() == len(alone[3].times)
    for with_padding, without in zip(padded[:2], alone[:2], strict=True):
        torch.testing.assert_close(with_padding[1, valid], without[0])
    segments, labels = ACTIONS[0].segments, ACTIONS[0].labels
    losses = model(features[1:], mask[1:], [Targets(segments=segments + first, labels=labels)])
    others = model(features[1:, :, inside], mask[1:, inside], [ACTIONS[0]])
    for term, loss in losses.items():
        torch.testing.assert_close(loss, others[term])


def test_detections_are_segments_of_their_own_class() -> None:
    config = replace(TRIDET, score_threshold=0.0, min_duration=-1.0)
    model = built(config)
    features, mask = sample([32, 32])
    logits, offsets, _, _ = model.predict(features, mask)
    points = make_points(32, config.ranges, torch.device("cpu"))
    found = model(features, mask)[0]
    rank = first = 0
    for length in points.lengths:
        scores = logits[0, first : first + length].sigmoid().flatten()
        for index in scores.argsort(descending=True, stable=True).tolist():
            step, label = divmod(index, 4)
            left, right = offsets[0, first + step, label].tolist()
            time, stride = points.times[first + step].item(), points.strides[first + step].item()
            assert found.labels[rank] == label
            expected = [time - stride * left, time + stride * right]
            assert found.segments[rank].tolist() == pytest.approx(expected, abs=1e-4)
            rank += 1
        first += length
    assert rank == len(found) == logits.shape[1] * 4
    assert (offsets[..., 0, :] - offsets[..., 1, :]).abs().max() > 1e-3  # of each class its own


def test_boundary_heads_do_not_shape_the_pyramid() -> None:
    model = built(TRIDET)
    features, mask = sample([32, 32])
    with torch.no_grad():
        model.offset_head.last.weight.zero_()
    offsets = model.predict(features, mask)[1]
    offsets.sum().backward()
    assert model.start_head.last.weight.grad.any()
    assert model.end_head.convs[0].weight.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in model.pyramid.parameters())


@pytest.mark.parametrize("start", [0.0, 0.1])
def test_filters_that_start_at_zero_learn_nothing(start: float) -> None:
    torch.manual_seed(0)
    model = replace(TRIDET, filter_start=start).build(6, 4)
    features, mask = sample([32, 32])
    sum(model(features, mask, ACTIONS).values(), torch.zeros(())).backward()
    for sgp in (*model.pyramid.stem, *model.pyramid.branch):
        assert isinstance(sgp, SGPLayer)
        for filters in (sgp.instant, sgp.video_gate, sgp.narrow, sgp.wide, sgp.window_gate):
            assert filters.weight.grad is not None
            assert bool(filters.weight.grad.any()) is (start > 0)


def test_noise_is_for_training_and_follows_the_seed() -> None:
    model = built(replace(TRIDET, drop_path=0.0, input_noise=0.1))
    features, mask = sample([32, 20])
    exact = model.predict(features, mask)[0]
    assert torch.equal(exact, model.predict(features, mask)[0])
    model.train()
    torch.manual_seed(3)
    first = model.predict(features, mask)[0]
    assert not torch.equal(first, model.predict(features, mask)[0])
    torch.manual_seed(3)
    assert torch.equal(first, model.predict(features, mask)[0])


def test_scores_of_all_three_heads_start_at_the_prior() -> None:
    model = replace(TRIDET, empty_classes=(2,)).build(6, 4)
    for head in (model.class_head, model.start_head, model.end_head):
        assert head.last.bias is not None
        start = head.last.bias.sigmoid().tolist()
        assert start == pytest.approx([0.01, 0.01, 1e-6, 0.01], rel=1e-4)


def test_published_configurations_have_the_published_number_of_parameters() -> None:
    """Counted once in the public implementation, with the files that it publishes."""
    thumos = TriDetConfig()
    anet = replace(thumos, width=256, window=15, widening=1.3, mlp_width=2048, bins=12)
    epic = replace(thumos, window=5, widening=2.0, mlp_width=1024)
    for config, channels, classes, expected in (
        (thumos, 2048, 20, 15_989_604),
        (anet, 512, 1, 12_811_555),
        (epic, 2304, 97, 18_594_123),
    ):
        with torch.device("meta"):
            model = config.build(channels, classes)
        assert sum(p.numel() for p in model.parameters()) == expected
