"""Swin beside its published weights: pooling, sizes and refusals."""

from dataclasses import replace

import pytest
import torch

from re2tal.backbones.swin import SwinConfig, swin_b, swin_s, swin_t

TINY = SwinConfig(
    patch=(2, 4, 4), embed_dim=8, depths=(2, 2), heads=(1, 2), window=(2, 3, 3), drop_path=0.0
)


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


@pytest.mark.parametrize(
    ("config", "parameters"), [(swin_t(), 28158070), (swin_s(), 49816678), (swin_b(), 88048984)]
)
def test_sizes_are_those_that_torchvision_publishes(config: SwinConfig, parameters: int) -> None:
    with torch.device("meta"):
        backbone = config.build()
    classifier = backbone.channels * 400 + 400
    assert sum(p.numel() for p in backbone.parameters()) + classifier == parameters


def test_places_are_the_features_before_pooling() -> None:
    backbone = TINY.build().eval()
    video = torch.randn(1, 3, 4, 16, 24)
    places = backbone.places(video)
    assert places.shape == (1, 2, 6, backbone.channels)
    torch.testing.assert_close(places.mean(dim=2).transpose(1, 2), backbone(video))


def test_depths_need_as_many_heads() -> None:
    with pytest.raises(ValueError, match="one number of heads for each, but got 1 for 2"):
        SwinConfig(depths=(2, 2), heads=(2,))
