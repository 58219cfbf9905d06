"""Both localizers train behind backbones of several families, rewired, from pixels to losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

from re2tal import rewire
from re2tal.backbones.slowfast import SlowFastConfig
from re2tal.backbones.swin import swin_toy
from re2tal.backbones.videomae import VideoMAEConfig
from re2tal.detector import Detector
from re2tal.localizers import Targets
from re2tal.localizers.protocol import LocalizerConfig
from re2tal.reversible import reversible_stages, set_reversible
from tests.localizers.small import ACTIONFORMER, VSGN

STEPS, FRAMES, PIXELS, CLASSES = 2, 16, 16, 3


class R3dBackbone(nn.Module):
    """The first stage of torchvision's R3D: whoever has a network wraps it like this."""

    channels = 64
    temporal_stride = 1

    def __init__(self) -> None:
        super().__init__()
        whole = VideoResNet(BasicBlock, [Conv3DSimple] * 4, [2, 1, 1, 1], BasicStem)
        self.stem, self.layer1 = whole.stem, whole.layer1

    def forward(self, video: Tensor) -> Tensor:
        features: Tensor = self.layer1(self.stem(video)).mean(dim=(3, 4))
        return features


def slowfast() -> nn.Module:
    return SlowFastConfig(depths=(2, 3), width=8, channel_ratio=4, temporal_stride=2).build()


def swin() -> nn.Module:
    return replace(swin_toy(), embed_dim=16).build()


def videomae() -> nn.Module:
    return VideoMAEConfig(patch=8, channels=16, depths=(3,), heads=2, clip=8).build()


BACKBONES = [slowfast, swin, R3dBackbone, videomae]


def training(
    backbone: Callable[[], Any], localizer: LocalizerConfig, *, reversible: bool
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], Detector[Any, Any]]:
    """The losses and the gradients of every step, and the detector after the last."""
    torch.manual_seed(0)
    network = backbone()
    rewire(network)
    set_reversible(network, reversible)
    detector = Detector(network, localizer.build(network.channels, CLASSES))
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    length = FRAMES // network.temporal_stride
    actions = Targets(
        segments=torch.tensor([[0.5, 2.0], [3.0, length - 0.5]]), labels=torch.tensor([2, 0])
    )
    mask = torch.ones(2, FRAMES, dtype=torch.bool)
    mask[1, 12:] = False
    losses, gradients = [], []
    for _ in range(STEPS):
        frames = torch.randint(0, 256, (2, FRAMES, PIXELS, PIXELS, 3), dtype=torch.uint8)
        terms = detector(frames, mask, [actions, actions])
        optimizer.zero_grad()
        torch.stack([*terms.values()]).sum().backward()
        losses.append({name: term.detach() for name, term in terms.items()})
        gradients.append(
            {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}
        )
        optimizer.step()
    return losses, gradients, detector


@pytest.mark.slow
@pytest.mark.parametrize("localizer", [ACTIONFORMER, VSGN], ids=["actionformer", "vsgn"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradients_reach_the_whole_backbone_and_are_those_of_stored_activations(
    backbone: Callable[[], Any], localizer: LocalizerConfig
) -> None:
    losses, gradients, detector = training(backbone, localizer, reversible=True)
    stored_losses, stored_gradients, stored = training(backbone, localizer, reversible=False)
    assert list(reversible_stages(detector.backbone))
    for step in range(STEPS):
        assert all(term.isfinite() for term in losses[step].values())
        trained = {n for n, grad in gradients[step].items() if grad.any()}
        wanted = {f"backbone.{name}" for name, _ in detector.backbone.named_parameters()}
        assert wanted <= trained
        for found, kept in (
            (losses[step], stored_losses[step]),
            (gradients[step], stored_gradients[step]),
        ):
            assert found.keys() == kept.keys()
            assert all(torch.equal(found[name], kept[name]) for name in found)
    for name, value in detector.state_dict().items():
        assert torch.equal(value, stored.state_dict()[name]), name
