from pathlib import Path

import pytest
import torch
from torchvision.models.video import Swin3D_T_Weights, SwinTransformer3d

from re2tal.backbones.swin import SwinConfig
from re2tal.backbones.weights import load_backbone_weights

TINY = SwinConfig(patch=(2, 4, 4), embed_dim=8, depths=(2,), heads=(1,), window=(2, 2, 2))
NAME = "torchvision:swin3d_t/KINETICS400_V1"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's cache, empty, and no network: requests go to a port where nobody listens."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hub" / "checkpoints"


def test_weights_in_torchs_cache_are_loaded_by_their_name(cache: Path) -> None:
    theirs = SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=8,
        depths=[2],
        num_heads=[1],
        window_size=[2, 2, 2],
        num_classes=5,
    )
    cache.mkdir(parents=True)
    torch.save(theirs.state_dict(), cache / Path(Swin3D_T_Weights.KINETICS400_V1.url).name)
    backbone = TINY.build()
    report = load_backbone_weights(backbone, NAME)
    assert set(report.left_out.values()) == {"of the classifier"}
    assert torch.equal(backbone.norm.weight, theirs.norm.weight)
    assert torch.equal(
        backbone.state_dict()["patch_embed.proj.weight"], theirs.patch_embed.proj.weight
    )


def test_without_a_network_a_path_is_asked_for(cache: Path) -> None:
    with pytest.raises(ValueError, match="cannot be downloaded from https://") as caught:
        load_backbone_weights(TINY.build(), NAME)
    assert str(cache) in str(caught.value)
    assert "give its path instead" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torchvision:swin4d/KINETICS400_V1", "has no model 'swin4d'.*swin3d_t, swin3d_s"),
        ("torchvision:swin3d_t/KINETICS", "but torchvision:swin3d_t/KINETICS400_V1"),
        ("torchvision:swin3d_t", "but torchvision:swin3d_t/KINETICS400_V1"),
    ],
)
def test_a_name_that_there_is_not_is_refused_with_those_that_there_are(
    name: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        load_backbone_weights(TINY.build(), name)
