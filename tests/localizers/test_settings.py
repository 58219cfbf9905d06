"""Settings at the ends of their ranges, and beyond."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from re2tal.localizers import ActionFormerConfig, Targets
from re2tal.localizers.vsgn import VSGNConfig

ACTIONFORMER: dict[str, Any] = {
    "levels": 1,
    "head_layers": 1,
    "embed_layers": 1,
    "stem_layers": 0,
    "top_k": 1,
}
VSGN: dict[str, Any] = {"levels": 1, "stem_stride": 1, "head_layers": 0, "top_k": 1}


@pytest.mark.parametrize(
    ("config", "settings", "least"),
    [
        *((ActionFormerConfig, {}, (name, value)) for name, value in ACTIONFORMER.items()),
        (ActionFormerConfig, {"streams": ((6, 512),)}, ("embed_layers", 0)),
        *((VSGNConfig, {}, (name, value)) for name, value in VSGN.items()),
    ],
)
def test_what_is_too_small_is_named(
    config: Any, settings: dict[str, Any], least: tuple[str, int]
) -> None:
    name, value = least
    config(**settings, **{name: value})
    message = rf"^\w+\.{name} must be {value} to .*, but is {value - 1}.$"
    with pytest.raises(ValueError, match=message):
        config(**settings, **{name: value - 1})


def test_settings_of_vsgn_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32, or of 4 below 128"):
        VSGNConfig(width=144)
    with pytest.raises(ValueError, match="at least 2"):
        VSGNConfig(neighbours=1)
    with pytest.raises(ValueError, match="positive scales"):
        VSGNConfig(anchor_scales=())


@pytest.mark.parametrize("name", ["match_tiou", "adjust_tiou"])
@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, 50.0, math.nan])
def test_an_overlap_is_a_share(name: str, value: float) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"^{name} must be above 0 and .* 1, but is {value}.$"):
        VSGNConfig(**settings)


@pytest.mark.parametrize(
    "config",
    [
        ActionFormerConfig(width=16, heads=2, **ACTIONFORMER),
        ActionFormerConfig(
            width=16, heads=2, streams=((6, 16),), **{**ACTIONFORMER, "embed_layers": 0}
        ),
        VSGNConfig(width=16, match_tiou=1.0, adjust_tiou=1.0, **VSGN),
    ],
)
def test_the_least_settings_work(config: ActionFormerConfig | VSGNConfig) -> None:
    torch.manual_seed(0)
    model = config.build(6, 4)
    features, mask = torch.randn(2, 6, 32), torch.ones(2, 32, dtype=torch.bool)
    action = Targets(segments=torch.tensor([[8.0, 20.0]]), labels=torch.tensor([2]))
    losses = model(features, mask, [action, action])
    assert all(loss.isfinite() for loss in losses.values())
    assert all(len(found) <= 1 for found in model.eval()(features, mask))
