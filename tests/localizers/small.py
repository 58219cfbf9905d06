"""Small localizers for 6 channels, and windows for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from re2tal.detection import Detections
from re2tal.localizers import ActionFormerConfig, Targets, TriDetConfig
from re2tal.localizers.vsgn import VSGNConfig

ACTIONFORMER = ActionFormerConfig(
    width=16, head_width=16, heads=2, levels=3, window=5, stem_layers=1, residual_scale=0.5
)
TRIDET = TriDetConfig(
    width=16,
    stem_layers=1,
    levels=3,
    window=3,
    widening=1.5,
    mlp_width=24,
    filter_start=0.3,
    residual_scale=0.5,
    head_width=16,
    bins=4,
)
VSGN = VSGNConfig(width=16, levels=3, stem_stride=1, neighbours=4, head_layers=2)
NOTHING = Targets(segments=torch.zeros(0, 2), labels=torch.zeros(0, dtype=torch.int64))
ACTIONS = [
    Targets(segments=torch.tensor([[2.0, 6.5], [8.0, 20.0]]), labels=torch.tensor([1, 3])),
    NOTHING,
]


def built(config: Any, classes: int = 4) -> Any:
    """A localizer whose parameters are all away from their start."""
    torch.manual_seed(0)
    model = config.build(6, classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def sample(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Features of windows of 32, and masks of the first ones."""
    features = torch.randn(len(lengths), 6, 32, generator=torch.Generator().manual_seed(1))
    return features, torch.arange(32)[None] < torch.tensor(lengths)[:, None]


def stitched() -> tuple[Tensor, Tensor]:
    """A whole window, and a clip of 9 features, a gap of 3 and the clip's copy."""
    features, mask = sample([32, 32])
    mask[1, 9:12] = False
    return features, mask


def same(a: Detections, b: Detections) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("segments", "scores", "labels"))
