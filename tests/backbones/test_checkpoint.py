import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.models.video import SwinTransformer3d

from re2tal import rewire
from re2tal.backbones.swin import SwinConfig
from re2tal.backbones.weights import load_backbone_weights, save_backbone_weights
from re2tal.weights import read_tensors

TINY = SwinConfig(
    patch=(2, 4, 4), embed_dim=8, depths=(2, 2), heads=(1, 2), window=(2, 2, 2), drop_path=0.0
)


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


def test_torchvisions_own_file_loads_without_its_classifier(tmp_path: Path) -> None:
    theirs = SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[1, 2],
        window_size=[2, 2, 2],
        num_classes=5,
    )
    path = tmp_path / "swin.pth"
    torch.save(theirs.state_dict(), path)
    backbone = TINY.build()
    load_backbone_weights(backbone, path)
    wanted = theirs.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in backbone.state_dict().items())


def test_every_weight_that_does_not_fit_is_named_and_none_is_loaded(tmp_path: Path) -> None:
    state = dict(TINY.build().state_dict())
    del state["norm.bias"]
    state["norm.scale"] = torch.zeros(1)
    state["norm.weight"] = torch.zeros(3)
    path = tmp_path / "w.pth"
    torch.save(state, path)
    backbone = TINY.build()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_backbone_weights(backbone, path)
    message = str(caught.value)
    assert "3 do not fit" in message
    assert "norm.bias is missing" in message
    assert "norm.scale is unknown" in message
    assert "norm.weight has shape (3,) instead of (16,)" in message
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


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
    with pytest.raises(ValueError, match=r"Is it another size") as caught:
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


class Unsafe:
    pass


@pytest.mark.parametrize("content", [Unsafe(), [1, 2], {"a": 1}], ids=["code", "list", "numbers"])
def test_pickles_of_anything_but_tensors_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "w.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"cannot be read|holds no weights"):
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


def test_what_is_not_unpickled_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": TINY.build().state_dict(), "message_hub": Unsafe()}, path)
    with pytest.raises(ValueError, match=r"\(.*test_checkpoint\.Unsafe\)") as caught:
        load_backbone_weights(TINY.build(), path)
    assert "write its tensors alone to another file" in str(caught.value)
