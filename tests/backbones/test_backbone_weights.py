"""Weights of backbones: published layouts, torchvision's names, files of our own, and refusals."""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.video import Swin3D_T_Weights, SwinTransformer3d

from re2tal import rewire
from re2tal.backbones.slowfast import (
    SlowFastConfig,
    pytorchvideo_slowfast_101,
    re2_slowfast_101,
    slowfast_50,
    slowfast_101,
)
from re2tal.backbones.swin import SwinConfig
from re2tal.backbones.weights import load_backbone_weights, save_backbone_weights
from re2tal.weights import WeightsMismatchError, read_tensors
from tests.backbones import published_slowfast as slowfast
from tests.backbones import published_swin as swin

TINY = SwinConfig(
    patch=(2, 4, 4), embed_dim=8, depths=(2, 2), heads=(1, 2), window=(2, 2, 2), drop_path=0.0
)
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
    "every frame": (
        slowfast.MMACTION2,
        slowfast.Shape(alpha=2, stride=1),
        replace(SLOWFAST, alpha=2, temporal_stride=1),
    ),
    "few slow frames": (
        slowfast.MMACTION2,
        slowfast.Shape(alpha=8, stride=2),
        replace(SLOWFAST, alpha=8, temporal_stride=2),
    ),
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
    assert found.shape == wanted.shape == (2, 320, 8 // shape.stride)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "depths"), [(slowfast_50(), (3, 4, 6, 3)), (slowfast_101(), (3, 4, 23, 3))]
)
def test_full_sizes_have_the_names_and_shapes_of_the_papers_table(
    config: SlowFastConfig, depths: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        found = config.build().state_dict()
        shape = slowfast.Shape(depths=depths, width=64, ratio=8)
        wanted = slowfast.random_weights(shape, slowfast.MMACTION2)
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in wanted.items()}


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


def test_the_averaged_backbone_of_an_opentad_detector_is_taken(tmp_path: Path) -> None:
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


def renamed(layout: str) -> tuple[dict[str, Tensor], str]:
    """Weights of a SlowFast with one name that it does not have, and that name."""
    state = of_slowfast(layout)
    name = next(name for name in state if "conv3.conv" in name or "conv_c" in name)
    wrong = name.replace("conv", "cnov")
    state[wrong] = state.pop(name)
    return state, wrong


@pytest.mark.parametrize(
    ("state", "config", "count", "message"),
    [
        *(
            (renamed(layout)[0], SLOWFAST_LAYOUTS[layout][2], 2, f"{renamed(layout)[1]} is unknown")
            for layout in ("mmaction2", "PyTorchVideo", "OpenTAD")
        ),
        (
            of_slowfast("mmaction2"),
            replace(SLOWFAST, depths=(2, 3, 1, 3)),
            None,
            "fast_path.layer4.2.conv1.bn.bias is mis",
        ),
        (of_swin("mmaction2"), SLOWFAST, None, "not those of this SlowFastBackbone"),
        (of_slowfast("OpenTAD"), SLOWFAST, 1, "relu_before_sum=True"),
    ],
)
def test_weights_of_another_network_are_refused(
    state: dict[str, Tensor],
    config: SlowFastConfig,
    count: int | None,
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(WeightsMismatchError, match=re.escape(message)) as caught:
        load_backbone_weights(config.build(), saved(state, tmp_path))
    assert count is None or len(caught.value.problems) == count


def test_a_file_of_two_backbones_is_refused(tmp_path: Path) -> None:
    state = of_swin("mmaction2")
    both = before_all("teacher.", state) | before_all("student.", state)
    with pytest.raises(ValueError, match=r"several backbones: .* at 'teacher\.', .* at 'student"):
        load_backbone_weights(SWIN.build(), saved(both, tmp_path))


# Weights of torchvision

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


def torchvisions() -> SwinTransformer3d:
    torch.manual_seed(0)
    return SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[1, 2],
        window_size=[2, 2, 2],
        num_classes=5,
    ).eval()


@pytest.mark.parametrize("by_name", [True, False])
def test_torchvisions_own_weights_load_without_its_classifier(
    by_name: bool, cache: Path, tmp_path: Path
) -> None:
    theirs = torchvisions()
    path = cache / Path(Swin3D_T_Weights.KINETICS400_V1.url).name if by_name else tmp_path / "w.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(theirs.state_dict(), path)
    backbone = TINY.build()
    report = load_backbone_weights(backbone, NAME if by_name else path)
    assert set(report.left_out.values()) == {"of the classifier"}
    wanted = theirs.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in backbone.state_dict().items())
    seen: list[Tensor] = []
    theirs.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    video = torch.randn(1, 3, 8, 56, 56)
    theirs(video)
    torch.testing.assert_close(features(backbone, video), seen[0].mean(dim=(3, 4)))


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


# Files


def test_weights_survive_a_round_trip_into_a_rewired_backbone(tmp_path: Path) -> None:
    saved, loaded = TINY.build(), TINY.build()
    path = tmp_path / "w.safetensors"
    save_backbone_weights(saved, path, {"held_out_top1": "0.9"})
    rewire(loaded)
    load_backbone_weights(loaded, path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(saved.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"held_out_top1": "0.9"}
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    saved = TINY.build()
    with torch.no_grad():
        saved.norm.weight[3] = value
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(saved.state_dict(), path)
    else:
        save_backbone_weights(saved, path, {})
    with pytest.raises(ValueError, match=r"1 weights are not finite \(nan or inf\): norm\.weight"):
        load_backbone_weights(TINY.build(), path)


def test_weights_of_another_size_give_a_short_message(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_backbone_weights(SwinConfig(depths=(2,), heads=(3,)).build(), path, {})
    with pytest.raises(ValueError, match=r"Is the network of another size") as caught:
        load_backbone_weights(TINY.build(), path)
    assert "more" in str(caught.value).splitlines()[-1]
    assert len(str(caught.value).splitlines()) == 12


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_files_that_are_no_weights_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(ValueError, match="cannot be read"):
        load_backbone_weights(TINY.build(), path)
    path.write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match="cannot be read"):
        load_backbone_weights(TINY.build(), path)


class Unsafe:
    pass


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_damaged_weights_are_read_or_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save({"x": torch.ones(4, 4)}, path)
    else:
        save_file({"x": torch.ones(4, 4)}, path)
    content, random = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = np.frombuffer(content, np.uint8).copy()
        places = random.integers(len(damaged), size=2)
        damaged[places] ^= np.uint8(1) << random.integers(8, size=2, dtype=np.uint8)
        path.write_bytes(damaged[: random.integers(1, 2 * len(damaged))].tobytes())
        try:
            read_tensors(path)
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict_ema": {"a": 1}}])
def test_pickles_of_anything_but_tensors_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "w.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match="holds no weights"):
        load_backbone_weights(TINY.build(), path)


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_numpy_numbers_beside_the_weights_do_no_harm(tmp_path: Path, module: str) -> None:
    saved, loaded = TINY.build(), TINY.build()
    path = tmp_path / "w.pth"
    best = {"best_score": np.float64(0.7), "epoch": np.int64(30), "lr": np.float32(0.1)}
    torch.save({"meta": best, "state_dict": saved.state_dict()}, path)
    with_names_of(module, path)
    load_backbone_weights(loaded, path)
    assert torch.equal(loaded.norm.weight, saved.norm.weight)


def with_names_of(module: str, path: Path) -> None:
    """Calls NumPy's module in a pickle as the NumPy that wrote it would."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content.replace(b"numpy._core.multiarray", module.encode()))
    assert module.encode() in path.read_bytes()


def test_a_class_that_is_not_unpickled_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": TINY.build().state_dict(), "message_hub": Unsafe()}, path)
    with pytest.raises(ValueError, match=r"\(.*test_backbone_weights\.Unsafe\)") as caught:
        load_backbone_weights(TINY.build(), path)
    assert "could run code" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert "write only its tensors to another file" in str(caught.value)
