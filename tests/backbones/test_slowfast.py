"""SlowFast beside its published weights: sizes, frozen statistics, refusals, reversible stages."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from re2tal.backbones.slowfast import (
    SlowFastConfig,
    pytorchvideo_slowfast_50,
    pytorchvideo_slowfast_101,
    slowfast_toy,
)
from re2tal.reversible import reversible_stages, rewire

TINY = SlowFastConfig(depths=(2, 3, 1, 2), width=8, channel_ratio=4)
KINETICS_CLASSES = 400


@pytest.mark.parametrize(
    ("config", "millions"),
    [  # published with the classifier, https://pytorchvideo.readthedocs.io/en/latest/model_zoo.html
        (pytorchvideo_slowfast_50(), 34.57),
        (replace(pytorchvideo_slowfast_50(), fusion_kernel=5, alpha=8), 34.48),  # 4x16
        (pytorchvideo_slowfast_101(), 62.83),
    ],
)
def test_sizes_are_those_that_are_published(config: SlowFastConfig, millions: float) -> None:
    with torch.device("meta"):
        backbone = config.build()
    assert backbone.channels == 2304
    classifier = 2304 * KINETICS_CLASSES + KINETICS_CLASSES
    count = sum(p.numel() for p in backbone.parameters()) + classifier
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rewired", [False, True])
def test_frozen_statistics_stay_in_training(frozen: bool, rewired: bool) -> None:
    backbone = replace(TINY, frozen_statistics=frozen).build()
    if rewired:
        rewire(backbone)
    before = {n: v.clone() for n, v in backbone.state_dict().items() if "running" in n}
    backbone.eval()
    assert backbone.train() is backbone
    backbone(torch.randn(2, 3, 8, 32, 32)).sum().backward()
    kept = [torch.equal(v, backbone.state_dict()[n]) for n, v in before.items()]
    assert all(kept) if frozen else not any(kept)
    assert backbone.training
    assert all(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(
    ("stride", "frames", "whole"), [(4, 6, 4), (2, 6, 4), (8, 12, 8), (6, 8, 12), (4, 0, 4)]
)
def test_frames_that_do_not_fit_are_refused(stride: int, frames: int, whole: int) -> None:
    backbone = replace(TINY, temporal_stride=stride).build()
    with pytest.raises(ValueError, match=f"a multiple of {whole} frames, but got {frames}"):
        backbone(torch.zeros(1, 3, frames, 32, 32))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: SlowFastConfig(depths=()), "1 to 8 stages, but got 0"),
        (lambda: SlowFastConfig(depths=(3, 0)), r"depths must be 1 to .* is \(3, 0\)"),
        (lambda: SlowFastConfig(width=60), "60 is not a multiple of 8"),
        (lambda: SlowFastConfig(alpha=0), "alpha must be 1 to"),
        (lambda: SlowFastConfig(fusion_kernel=4), "odd, so that it is centred, but is 4"),
    ],
)
def test_impossible_shapes_are_refused(build: Callable[[], SlowFastConfig], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build()


def test_each_pathways_stage_becomes_reversible() -> None:
    backbone = slowfast_toy().build()
    report = rewire(backbone)
    found = {stage.container: (stage.blocks, stage.branches) for stage in report.stages}
    layers = [f"{p}.layer{i}" for p in ("slow_path", "fast_path") for i in (1, 2)]
    assert found == dict.fromkeys(layers, (("1", "2"), 2))
    assert [name for name, _ in reversible_stages(backbone)] == layers
    left = {row.name: row.recomputed for row in report.left_out}
    stems = ["slow_path.conv1", "fast_path.conv1"]
    laterals = "slow_path.conv1_lateral…layer1_lateral"
    assert left == dict.fromkeys([*stems, laterals, *(f"{n}.0" for n in layers)], True)
