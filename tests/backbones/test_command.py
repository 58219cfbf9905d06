"""`python -m re2tal.backbones`: the table, conversion of weights, and what becomes reversible."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from re2tal.backbones.__main__ import main
from re2tal.backbones.slowfast import slowfast_toy
from re2tal.backbones.swin import TOY_WEIGHTS
from re2tal.backbones.weights import load_backbone_weights, save_backbone_weights


def theirs(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in mmaction2's layout of the toy SlowFast."""
    state = slowfast_toy().build().state_dict()
    path = folder / "theirs.pth"
    torch.save({"state_dict": {f"backbone.{n}": v for n, v in state.items()}}, path)
    return path, state


def test_a_file_is_converted_and_every_name_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = theirs(tmp_path)
    target = tmp_path / "ours.safetensors"
    assert main(["convert", str(path), str(target), "--backbone", "slowfast_toy"]) == 0
    printed = capsys.readouterr().out
    assert f"{len(state)} placed, 0 left out, 0 kept" in printed
    assert all(f"backbone.{name} -> {name}\n" in printed for name in state)
    with safe_open(target, "pt") as file:
        assert file.metadata()["source"] == "theirs.pth"
        assert file.metadata()["layout"].startswith("mmaction2's SlowFast")
    backbone = slowfast_toy().build()
    load_backbone_weights(backbone, target)
    assert all(torch.equal(v, state[n]) for n, v in backbone.state_dict().items())


def test_all_that_does_not_fit_is_printed_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = theirs(tmp_path)
    target = tmp_path / "ours.safetensors"
    assert main(["convert", str(path), str(target), "--backbone", "swin_toy"]) == 1
    printed = capsys.readouterr().err
    assert "are not those of this SwinBackbone" in printed
    assert all(f"  backbone.{name} (here {name}) is unknown\n" in printed for name in state)
    assert main(["convert", str(tmp_path / "none.pth"), str(target), "--backbone", "swin_toy"]) == 1
    assert "none.pth cannot be read" in capsys.readouterr().err
    assert not target.exists()


def test_rewiring_is_reported_and_keeps_every_weight(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewire", "swin_toy", "--weights", TOY_WEIGHTS]) == 0
    printed = capsys.readouterr().out
    assert "features.0" in printed
    assert "features.2" in printed
    assert "each with its name and value" in printed


def test_weights_of_another_network_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "slowfast.safetensors"
    save_backbone_weights(slowfast_toy().build(), path, {})
    assert main(["rewire", "swin_toy", "--weights", str(path)]) == 1
    assert "SwinBackbone" in capsys.readouterr().err


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "swin_t: a window of 2 n frames, a feature for each 2\n" in printed
    assert "dinov2_s: a window of any number of frames, a feature for each frame\n" in printed
    assert "weights: torchvision:swin3d_t/KINETICS400_V1\n" in printed
