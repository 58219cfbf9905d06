"""Promises of every localizer: padding, batches, gradients, precision, settings, learning."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from re2tal.detection import Detections, NmsConfig, mean_average_precision, nms
from re2tal.localizers import ActionFormerConfig, Localizer, Targets, TriDetConfig
from re2tal.localizers.protocol import LocalizerConfig
from re2tal.localizers.vsgn import VSGNConfig
from tests.localizers.small import (
    ACTIONFORMER,
    ACTIONS,
    NOTHING,
    TRIDET,
    VSGN,
    built,
    same,
    sample,
    stitched,
)

CONFIGS: dict[str, LocalizerConfig] = {
    "actionformer": ACTIONFORMER,
    "actionformer, global": replace(ACTIONFORMER, window=0),
    "tridet": TRIDET,
    "vsgn": VSGN,
    "vsgn, plain": replace(VSGN, graph=False),
}
every_localizer = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@every_localizer
def test_it_is_a_localizer(config: LocalizerConfig) -> None:
    assert isinstance(config, LocalizerConfig)
    localizer: Localizer = built(config)
    features, mask = sample([32, 20])
    losses = localizer(features, mask, ACTIONS)
    assert isinstance(losses, dict)
    boundaries = {"adjustment", "start", "end", "action"} if isinstance(config, VSGNConfig) else {}
    assert set(losses) == {"classification", "regression", *boundaries}
    assert all(loss.shape == () and loss > 0 for loss in losses.values())
    found = localizer(features, mask)
    assert isinstance(found, list)
    assert [type(f) for f in found] == [Detections, Detections]


@every_localizer
def test_the_content_of_padding_changes_nothing(config: LocalizerConfig) -> None:
    model = built(config)
    for features, mask in (sample([32, 21]), stitched(), sample([3, 0])):
        filled = features.masked_fill(~mask[:, None], torch.nan)
        other = features.masked_fill(~mask[:, None], 1e4)
        for a, b in zip(model(filled, mask), model(other, mask), strict=True):
            assert same(a, b)
            assert a.segments.isfinite().all()
        losses, others = model(filled, mask, ACTIONS), model(other, mask, ACTIONS)
        assert all(torch.equal(losses[term], others[term]) for term in losses)
        assert all(loss.isfinite() for loss in losses.values())
    assert len(model(features, mask)[1]) == 0  # without a valid feature there is no detection


@every_localizer
def test_a_sample_does_not_depend_on_the_batch(config: LocalizerConfig) -> None:
    model = built(config)
    for features, mask in (sample([32, 20]), stitched()):
        alone = model(features[1:], mask[1:])[0]
        assert len(alone) > 0
        both = model(features, mask)[1]
        torch.testing.assert_close(both.scores, alone.scores)
        torch.testing.assert_close(both.segments, alone.segments)


@every_localizer
def test_every_parameter_learns_and_batches_without_actions_are_harmless(
    config: LocalizerConfig,
) -> None:
    model = built(config).train()
    # Whole windows and stitched ones, one without a feature, and a batch of padding alone.
    gap = stitched()
    gap[1][0] = False
    cases = [
        (*stitched(), ACTIONS),
        (*sample([32, 20]), [NOTHING, NOTHING]),
        (*gap, ACTIONS[::-1]),
        (*sample([0, 0]), ACTIONS),
    ]
    for features, mask, targets in cases:
        model.zero_grad()
        losses = model(features.requires_grad_(), mask, targets)
        sum(losses.values(), torch.zeros(())).backward()
        learns = targets is ACTIONS and mask.any()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # A bias common to all keys cancels in the softmax.
            assert parameter.grad.any() or not learns or name.endswith("key.bias"), name
        assert features.grad is not None
        assert not features.grad.masked_select(~mask[:, None]).any()
        if targets[0] is targets[1] or not mask.any():
            assert losses["regression"].item() == 0 == losses.get("adjustment", 0)


@every_localizer
def test_half_precision_inside_gives_float32_outside(config: LocalizerConfig) -> None:
    model = built(config)
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


@pytest.mark.parametrize(("config", "multiple"), [(ACTIONFORMER, 4), (TRIDET, 4), (VSGN, 8)])
def test_input_that_cannot_be_is_refused(config: LocalizerConfig, multiple: int) -> None:
    with pytest.raises(ValueError, match=f"30 features.*multiple of {multiple}"):
        built(config)(torch.zeros(1, 6, 30), torch.ones(1, 30, dtype=torch.bool))
    for label in (4, -1):
        unknown = Targets(segments=torch.ones(1, 2), labels=torch.tensor([label]))
        with pytest.raises(ValueError, match=f"label {label}"):
            built(config)(*sample([32, 32]), [unknown, NOTHING])
    labels: Tensor = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="Targets need"):
        Targets(segments=torch.zeros(3, 2), labels=labels)


# Settings at the ends of their ranges, and beyond

LEAST_ACTIONFORMER: dict[str, Any] = {
    "levels": 1,
    "head_layers": 1,
    "embed_layers": 1,
    "stem_layers": 0,
    "top_k": 1,
}
LEAST_TRIDET: dict[str, Any] = {
    "levels": 1,
    "head_layers": 1,
    "embed_layers": 1,
    "stem_layers": 0,
    "mlp_width": 1,
    "bins": 1,
    "top_k": 1,
}
LEAST_VSGN: dict[str, Any] = {"levels": 1, "stem_stride": 1, "head_layers": 0, "top_k": 1}


@pytest.mark.parametrize(
    ("config", "settings", "least"),
    [
        *((ActionFormerConfig, {}, (name, value)) for name, value in LEAST_ACTIONFORMER.items()),
        (ActionFormerConfig, {"streams": ((6, 512),)}, ("embed_layers", 0)),
        *((TriDetConfig, {}, (name, value)) for name, value in LEAST_TRIDET.items()),
        *((VSGNConfig, {}, (name, value)) for name, value in LEAST_VSGN.items()),
    ],
)
def test_a_setting_that_is_too_small_is_named(
    config: Any, settings: dict[str, Any], least: tuple[str, int]
) -> None:
    name, value = least
    config(**settings, **{name: value})
    message = rf"^\w+\.{name} must be {value} to .*, but is {value - 1}.$"
    with pytest.raises(ValueError, match=message):
        config(**settings, **{name: value - 1})


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (ActionFormerConfig, {"window": (3, 3)}, "one for each level"),
        (ActionFormerConfig, {"window": 8}, "odd"),
        (ActionFormerConfig, {"width": 10}, "heads"),
        (ActionFormerConfig, {"streams": ((4, 256), (8, 128))}, "add up"),
        (ActionFormerConfig, {"streams": ((4, 256), (3, 256))}, "features of 6 channels"),
        (ActionFormerConfig, {"empty_classes": (4,)}, "empty classes"),
        (ActionFormerConfig, {"empty_classes": (-1,)}, "empty classes"),
        (TriDetConfig, {"window": 4}, "must be odd"),
        (TriDetConfig, {"width": 24}, "multiple of 16"),
        (TriDetConfig, {"empty_classes": (4,)}, "empty classes"),
        (TriDetConfig, {"filter_start": math.inf}, "filter_start must be 0 to"),
        (VSGNConfig, {"width": 144}, "multiple of 32, or of 4 below 128"),
        (VSGNConfig, {"neighbours": 1}, "at least 2"),
        (VSGNConfig, {"anchor_scales": ()}, "positive scales"),
        *(
            (VSGNConfig, {name: value}, f"^{name} must be above 0 and .* 1, but is {value}.$")
            for name in ("match_tiou", "adjust_tiou")
            for value in (0.0, -0.5, 1.01, 50.0, math.nan)
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(
    config: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings).build(6, 4)


@pytest.mark.parametrize(
    "config",
    [
        ActionFormerConfig(width=16, heads=2, **LEAST_ACTIONFORMER),
        ActionFormerConfig(
            width=16, heads=2, streams=((6, 16),), **{**LEAST_ACTIONFORMER, "embed_layers": 0}
        ),
        TriDetConfig(width=16, **LEAST_TRIDET),
        VSGNConfig(width=16, match_tiou=1.0, adjust_tiou=1.0, **LEAST_VSGN),
    ],
)
def test_the_least_settings_work(config: LocalizerConfig) -> None:
    torch.manual_seed(0)
    model: Any = config.build(6, 4)
    features, mask = sample([32, 32])
    action = Targets(segments=torch.tensor([[8.0, 20.0]]), labels=torch.tensor([2]))
    losses = model(features, mask, [action, action])
    assert all(loss.isfinite() for loss in losses.values())
    assert all(len(found) <= 1 for found in model.eval()(features, mask))


# Learning


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
@pytest.mark.parametrize(
    ("config", "rate", "steps", "least"),
    [
        (
            replace(ACTIONFORMER, width=32, head_width=32, levels=4, initial_normalizer=20.0),
            6e-3,
            60,
            0.9,
        ),
        (
            replace(
                TRIDET,
                width=32,
                mlp_width=64,
                filter_start=0.1,
                head_width=32,
                levels=4,
                bins=8,
                initial_normalizer=20.0,
            ),
            6e-3,
            60,
            0.9,
        ),
        (VSGNConfig(width=32, levels=4, stem_stride=1, neighbours=6, head_layers=2), 4e-3, 35, 0.8),
    ],
)
def test_it_learns_planted_segments(
    config: LocalizerConfig, rate: float, steps: int, least: float
) -> None:
    """Average mAP on windows that it has not seen, after a short training."""
    torch.manual_seed(0)
    model: Any = config.build(6, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    mask = torch.ones(8, 64, dtype=torch.bool)
    for step in range(steps):
        features, targets = planted(8, step)
        losses = model(features, mask, targets)
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
    features, targets = planted(8, 1000)
    found = [nms(detections, NmsConfig()) for detections in model.eval()(features, mask)]
    score = mean_average_precision(
        {str(i): target for i, target in enumerate(targets)},
        {str(i): detections for i, detections in enumerate(found)},
        num_classes=2,
        thresholds=[0.3, 0.5, 0.7],
    ).average
    assert score > least
