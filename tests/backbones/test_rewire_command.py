"""`python -m re2tal.backbones.rewire` shows what becomes reversible, and refuses other weights."""

from pathlib import Path

import pytest

from pipelines.config.recipes import TOY_WEIGHTS
from re2tal.backbones.checkpoint import save_backbone_weights
from re2tal.backbones.rewire import main
from re2tal.backbones.slowfast import slowfast_toy


def test_it_reports_and_keeps_every_weight(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["swin_toy", "--weights", TOY_WEIGHTS]) == 0
    printed = capsys.readouterr().out
    assert "features.0" in printed
    assert "features.2" in printed
    assert "each with its name and value" in printed


def test_weights_of_another_network_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "slowfast.safetensors"
    save_backbone_weights(slowfast_toy().build(), path, {})
    assert main(["swin_toy", "--weights", str(path)]) == 1
    assert "SwinBackbone" in capsys.readouterr().err
