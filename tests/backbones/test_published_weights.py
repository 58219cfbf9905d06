from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from re2tal import rewire
from re2tal.backbones.slowfast import (
    SlowFastConfig,
    pytorchvideo_slowfast_101,
    re2_slowfast_101,
)
from re2tal.backbones.swin import SwinConfig
from re2tal.backbones.weights import load_backbone_weights
from re2tal.weights import WeightsMismatchError
from tests.backbones import published_slowfast as slowfast
from tests.backbones import published_swin as swin

SWIN = SwinConfig(
    patch=(2, 4, 4), embed_dim=8, depths=(2, 2, 2, 2), heads=(1, 2, 2, 4), window=(2, 3, 3)
)
SLOWFAST = SlowFastConfig(depths=(2, 3, 1, 2), width=8, channel_ratio=4)
PYTORCHVIDEO, RE2_SLOWFAST = (
    replace(full, depths=SLOWFAST.depths, width=SLOWFAST.width, channel_ratio=4)
    for full in (pytorchvideo_slowfast_101(), re2_slowfast_101())
)

SWIN_LAYOUTS = {"mmaction2": (swin.plain_names, False), "OpenTAD": (swin.coupled_names, True)}
SLOWFAST_LAYOUTS = {
    "mmaction2": (slowfast.MMACTION2, slowfast.Shape(), SLOWFAST),
    "PyTorchVideo": (
        slowfast.PYTORCHVIDEO,
        slowfast.Shape(fusion_norm=True, fusion_kernel=5),
        PYTORCHVIDEO,
    ),
    "OpenTAD": (slowfast.OPENTAD, slowfast.Shape(), RE2_SLOWFAST),
}


def of_swin(layout: str) -> dict[str, Tensor]:
    return swin.random_weights(swin.Shape(), SWIN_LAYOUTS[layout][0])


def of_slowfast(layout: str) -> dict[str, Tensor]:
    names, shape, _ = SLOWFAST_LAYOUTS[layout]
    return slowfast.random_weights(shape, names)


def before_all(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def saved(content: Any, folder: Path) -> Path:
    path = folder / "theirs.pth"
    torch.save(content, path)
    return path


def features(backbone: nn.Module, video: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = backbone.eval()(video)
    return found


# Equal outputs


@pytest.mark.parametrize("layout", SWIN_LAYOUTS)
def test_a_published_swin_computes_the_same(layout: str, tmp_path: Path) -> None:
    names, coupled = SWIN_LAYOUTS[layout]
    state = of_swin(layout)
    torch.manual_seed(2)
    video = torch.randn(2, 3, 10, 40, 36)  # sides that are no multiples of windows or of two
    wanted = swin.network(state, swin.Shape(), names, video, coupled=coupled)
    backbone = SWIN.build()
    if coupled:
        rewire(backbone, exact=False)
    load_backbone_weights(backbone, saved(before_all("backbone.", state), tmp_path))
    found = features(backbone, video)
    assert found.shape == (2, 64, 5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", SLOWFAST_LAYOUTS)
def test_a_published_slowfast_computes_the_same(layout: str, tmp_path: Path) -> None:
    names, shape, config = SLOWFAST_LAYOUTS[layout]
    state = of_slowfast(layout)
    coupled = layout == "OpenTAD"
    torch.manual_seed(2)
    video = torch.randn(2, 3, 8, 40, 36, dtype=torch.float64)
    precise = {name: value.double() for name, value in state.items()}
    wanted = slowfast.network(precise, shape, names, video, coupled=coupled)
    backbone = config.build().double()
    if coupled:
        rewire(backbone, exact=False)
    load_backbone_weights(backbone, saved(before_all("backbone.", state), tmp_path))
    found = features(backbone, video)
    assert found.shape == wanted.shape == (2, 320, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# Every key is accounted for


def test_every_name_is_reported(tmp_path: Path) -> None:
    state = of_swin("mmaction2")
    content = {
        "meta": {"epoch": 30, "classes": ("a", "b")},
        "state_dict": before_all("backbone.", state) | {"cls_head.fc_cls.weight": torch.zeros(5)},
    }
    backbone = SWIN.build()
    report = load_backbone_weights(backbone, saved(content, tmp_path))
    assert report.layout == "Video Swin of mmaction2 or of its authors"
    assert set(report.placed) == set(before_all("backbone.", state))
    assert sorted(report.placed.values()) == sorted(backbone.state_dict())
    assert report.placed["backbone.layers.1.blocks.0.mlp.fc2.bias"] == "features.2.0.mlp.3.bias"
    assert report.placed["backbone.layers.2.downsample.norm.bias"] == "features.5.norm.bias"
    assert report.placed["backbone.norm3.weight"] == "norm.weight"
    assert report.left_out == {"cls_head.fc_cls.weight": "not of the backbone"}
    text = str(report)
    assert f"{len(state)} placed, 1 left out, 0 kept" in text
    assert "backbone.norm3.weight -> norm.weight" in text
    assert "cls_head.fc_cls.weight left out: not of the backbone" in text


def test_the_authors_own_name_of_the_last_norm_is_known(tmp_path: Path) -> None:
    state = of_swin("mmaction2")
    theirs = {name.replace("norm3", "norm"): value for name, value in state.items()}
    backbone = SWIN.build()
    report = load_backbone_weights(backbone, saved(theirs, tmp_path))
    assert report.placed["norm.weight"] == "norm.weight"
    assert torch.equal(backbone.norm.weight, state["norm3.weight"])


@pytest.mark.parametrize(
    ("state", "config", "end"),
    [
        (of_swin("OpenTAD"), SWIN, "relative_position_index"),
        (of_slowfast("PyTorchVideo"), PYTORCHVIDEO, "num_batches_tracked"),
    ],
    ids=["swin", "slowfast"],
)
def test_buffers_that_some_versions_do_not_write_are_kept(
    state: dict[str, Tensor], config: SwinConfig | SlowFastConfig, end: str, tmp_path: Path
) -> None:
    some = {name: value for name, value in state.items() if not name.endswith(end)}
    backbone = config.build()
    own = {name: value.clone() for name, value in backbone.state_dict().items()}
    report = load_backbone_weights(backbone, saved(some, tmp_path))
    assert report.kept == sorted(name for name in own if name.endswith(end))
    assert all(torch.equal(backbone.state_dict()[name], own[name]) for name in report.kept)


def test_pytorchvideos_classifier_lies_among_the_blocks(tmp_path: Path) -> None:
    head = {"blocks.6.proj.weight": torch.zeros(5, 320), "blocks.6.proj.bias": torch.zeros(5)}
    content = {"model_state": of_slowfast("PyTorchVideo") | head, "epoch": 196}
    report = load_backbone_weights(PYTORCHVIDEO.build(), saved(content, tmp_path))
    assert report.left_out == dict.fromkeys(head, "of the classifier")
    assert "mean 0.45" in report.note
    report.require_normalization((0.45,) * 3, (0.225,) * 3, option="--model.")
    with pytest.raises(
        ValueError,
        match=r"add --model.mean 0.45 0.45 0.45 --model.std 0.225 0.225 0.225\.$",
    ):
        report.require_normalization((0.45,) * 3, (0.229, 0.224, 0.225), option="--model.")


def test_weights_of_imagenets_colours_are_taken_with_any(tmp_path: Path) -> None:
    report = load_backbone_weights(SWIN.build(), saved(of_swin("mmaction2"), tmp_path))
    report.require_normalization((0.5,) * 3, (0.5,) * 3, option="--")


def test_of_a_detector_of_opentad_the_averaged_backbone_is_taken(tmp_path: Path) -> None:
    prefix = "module.backbone.model.backbone."
    averaged = before_all(prefix, of_swin("OpenTAD")) | {"module.rpn_head.scale": torch.ones(1)}
    content = {
        "epoch": 14,
        "state_dict": {name: torch.zeros_like(value) for name, value in averaged.items()},
        "state_dict_ema": averaged,
    }
    backbone = SWIN.build()
    report = load_backbone_weights(backbone, saved(content, tmp_path))
    assert report.layout == "OpenTAD's Re2Swin"
    assert report.left_out == {"module.rpn_head.scale": "not of the backbone"}
    assert torch.equal(backbone.norm.weight, averaged[f"{prefix}norm3.weight"])


# What does not fit


def test_all_that_does_not_fit_is_listed_by_its_published_name(tmp_path: Path) -> None:
    state = before_all("backbone.", of_swin("mmaction2"))
    del state["backbone.layers.0.blocks.1.norm1.bias"]
    state["backbone.layers.0.blocks.1.attn.gate"] = torch.zeros(1)
    state["backbone.layers.0.scale"] = torch.zeros(1)
    state["backbone.norm.weight"] = torch.zeros(64)
    state["backbone.norm.bias"] = torch.zeros(64)
    narrow = "backbone.layers.1.downsample.norm.bias"
    state[narrow] = torch.zeros(1)
    backbone = SWIN.build()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(WeightsMismatchError, match="recognised as: Video Swin of mmac") as caught:
        load_backbone_weights(backbone, saved(state, tmp_path))
    assert set(caught.value.problems) == {
        "backbone.layers.0.scale is unknown",
        "features.0.1.norm1.bias is missing",
        "backbone.layers.0.blocks.1.attn.gate (here features.0.1.attn.gate) is unknown",
        f"{narrow} (here features.3.norm.bias) has shape (1,) instead of (64,)",
        "backbone.norm.weight (here norm.weight) is there 2 times, under different names",
        "backbone.norm.bias (here norm.bias) is there 2 times, under different names",
    }
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("layout", SLOWFAST_LAYOUTS)
def test_names_that_a_slowfast_does_not_have_are_refused(layout: str, tmp_path: Path) -> None:
    state = of_slowfast(layout)
    name = next(name for name in state if "conv3.conv" in name or "conv_c" in name)
    wrong = name.replace("conv", "cnov")
    state[wrong] = state.pop(name)
    with pytest.raises(WeightsMismatchError) as caught:
        load_backbone_weights(SLOWFAST_LAYOUTS[layout][2].build(), saved(state, tmp_path))
    assert len(caught.value.problems) == 2
    assert any("is missing" in problem for problem in caught.value.problems)
    assert f"{wrong} is unknown" in caught.value.problems


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    state = of_slowfast("mmaction2")
    backbone = replace(SLOWFAST, depths=(2, 3, 1, 3)).build()
    with pytest.raises(WeightsMismatchError, match=r"fast_path\.layer4\.2\.conv1\.bn\.bias is mis"):
        load_backbone_weights(backbone, saved(state, tmp_path))


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsMismatchError, match="not those of this SlowFastBackbone"):
        load_backbone_weights(SLOWFAST.build(), saved(of_swin("mmaction2"), tmp_path))


def test_opentads_slowfast_is_refused_where_the_relu_follows_the_sum(tmp_path: Path) -> None:
    path = saved(of_slowfast("OpenTAD"), tmp_path)
    with pytest.raises(WeightsMismatchError, match="relu_before_sum=True") as caught:
        load_backbone_weights(SLOWFAST.build(), path)
    assert len(caught.value.problems) == 1


def test_a_file_of_two_backbones_is_refused(tmp_path: Path) -> None:
    state = of_swin("mmaction2")
    both = before_all("teacher.", state) | before_all("student.", state)
    with pytest.raises(ValueError, match=r"several backbones: .* at 'teacher\.', .* at 'student"):
        load_backbone_weights(SWIN.build(), saved(both, tmp_path))
