from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from re2tal.backbones.checkpoint import load_backbone_weights
from re2tal.backbones.convert import main
from re2tal.backbones.slowfast import slowfast_toy


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
    assert main([str(path), str(target), "--backbone", "slowfast_toy"]) == 0
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
    assert main([str(path), str(target), "--backbone", "swin_toy"]) == 1
    printed = capsys.readouterr().err
    assert "are not those of this SwinBackbone" in printed
    assert all(f"  backbone.{name} (here {name}) is unknown\n" in printed for name in state)
    assert main([str(tmp_path / "none.pth"), str(target), "--backbone", "swin_toy"]) == 1
    assert "none.pth cannot be read" in capsys.readouterr().err
    assert not target.exists()
