from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models.video import SwinTransformer3d, swin3d_t
from torchvision.models.video.swin_transformer import SwinTransformerBlock

from re2tal import rewire
from re2tal.backbones.protocol import Backbone
from re2tal.backbones.swin import SwinConfig, swin_b, swin_s, swin_t, swin_toy

TINY = SwinConfig(
    patch=(2, 4, 4), embed_dim=8, depths=(2, 2), heads=(1, 2), window=(2, 3, 3), drop_path=0.0
)


@pytest.mark.parametrize("rewired", [False, True])
def test_frames_become_features_of_the_stated_shape(rewired: bool) -> None:
    backbone = TINY.build()
    if rewired:
        rewire(backbone)
    as_protocol: Backbone = backbone  # checked by the type checker
    features = as_protocol(torch.randn(2, 3, 12, 20, 28))
    assert features.shape == (2, backbone.channels, 12 // backbone.temporal_stride)
    assert (backbone.channels, backbone.temporal_stride) == (16, 2)


def test_pooling_averages_neighbouring_features() -> None:
    torch.manual_seed(0)
    plain, pooled = TINY.build().eval(), replace(TINY, pooling=3).build().eval()
    pooled.load_state_dict(plain.state_dict())
    assert pooled.temporal_stride == 6
    video = torch.randn(2, 3, 12, 20, 28)
    features = plain(video)  # 6 of them
    expected = torch.stack([features[:, :, :3].mean(dim=2), features[:, :, 3:].mean(dim=2)], dim=2)
    torch.testing.assert_close(pooled(video), expected)
    with pytest.raises(ValueError, match="pooling"):
        replace(TINY, pooling=0)


def test_features_are_torchvisions_own_before_its_classifier() -> None:
    torch.manual_seed(0)
    theirs = swin3d_t().eval()
    ours = swin_t().build().eval()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith("head.")}
    ours.load_state_dict(weights)
    seen: list[torch.Tensor] = []
    theirs.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    video = torch.randn(1, 3, 8, 56, 56)
    with torch.inference_mode():
        theirs(video)
        features = ours(video)
    assert features.shape == (1, 768, 4)
    torch.testing.assert_close(features, seen[0].mean(dim=(3, 4)))


@pytest.mark.parametrize(
    ("config", "parameters"), [(swin_t(), 28158070), (swin_s(), 49816678), (swin_b(), 88048984)]
)
def test_sizes_are_those_that_torchvision_publishes(config: SwinConfig, parameters: int) -> None:
    with torch.device("meta"):
        backbone = config.build()
    classifier = backbone.channels * 400 + 400
    assert sum(p.numel() for p in backbone.parameters()) + classifier == parameters


def test_its_stages_are_torchvisions_modules() -> None:
    backbone = TINY.build()
    assert isinstance(backbone, SwinTransformer3d)
    stages = [m for m in backbone.features if isinstance(m, nn.Sequential)]
    assert [len(stage) for stage in stages] == [2, 2]
    assert all(isinstance(block, SwinTransformerBlock) for stage in stages for block in stage)
    before = list(backbone.state_dict())
    report = rewire(backbone)
    assert len(report.stages) == 2
    assert list(backbone.state_dict()) == before


def test_every_parameter_gets_a_gradient_from_the_features() -> None:
    backbone = TINY.build()
    backbone(torch.randn(1, 3, 8, 24, 24)).square().sum().backward()
    silent = [name for name, p in backbone.named_parameters() if p.grad is None]
    assert not silent


def test_places_are_the_features_before_pooling() -> None:
    backbone = TINY.build().eval()
    video = torch.randn(1, 3, 4, 16, 24)
    places = backbone.places(video)
    assert places.shape == (1, 2, 2, 3, backbone.channels)
    torch.testing.assert_close(places.mean(dim=(2, 3)).transpose(1, 2), backbone(video))


def test_the_toy_size_fits_what_the_repository_ships() -> None:
    floats = sum(p.numel() for p in swin_toy().build().parameters())
    assert floats * 4 <= 4 * 2**20


def test_depths_need_as_many_heads() -> None:
    with pytest.raises(ValueError, match="one number of heads for each, but got 1 for 2"):
        SwinConfig(depths=(2, 2), heads=(2,))
