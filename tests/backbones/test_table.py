"""The table of backbones: what every entry promises, and an entry of a module of one's own."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from re2tal.backbones import table
from re2tal.backbones.protocol import Strided
from re2tal.backbones.swin import SwinConfig
from re2tal.backbones.table import Entry, backbone, backbones, entry_of
from re2tal.backbones.weights import HUB, PREFIX, torchvision_weights
from re2tal.errors import UserError


@pytest.mark.parametrize("entry", backbones().values(), ids=backbones().keys())
def test_an_entry_tells_the_truth_about_its_backbone(entry: Entry) -> None:
    config: Any = entry.make()
    strided = isinstance(config, Strided)
    assert strided
    if "toy" in entry.name:  # its weights can be shipped
        with torch.device("meta"):
            assert sum(p.numel() for p in config.build().parameters()) <= 2**20
    config = replace(config, depths=tuple(min(depth, 2) for depth in config.depths))  # faster
    with torch.device("meta"):
        built = config.build().eval()
        frames = torch.empty(1, 3, 8 * built.multiple, 112, 112)  # patches of 14 and 16
        features = built(frames)
        slower = config.with_stride(4 * built.temporal_stride).build().eval()
        more = torch.empty(1, 3, slower.multiple, 112, 112)
        fewer = slower(more)
    assert fewer.shape == (1, slower.channels, slower.multiple // slower.temporal_stride)
    assert features.shape == (1, built.channels, frames.shape[2] // built.temporal_stride)
    assert slower.temporal_stride == 4 * built.temporal_stride
    assert slower.multiple % slower.temporal_stride == 0
    assert entry_of(entry.name) is entry


@pytest.mark.parametrize("entry", backbones().values(), ids=backbones().keys())
def test_known_weights_exist(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(source, lambda url, **options: {"from": url, **options})
    for weights in entry.weights:
        if weights.startswith(PREFIX):
            assert torchvision_weights(weights)
        else:  # the hub cannot be asked here
            assert weights.startswith(HUB) or Path(weights).is_file()


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"no backbone 'resnet'. Choose one of: .*swin_t.*swin_b"):
        entry_of("resnet")


def test_a_function_elsewhere_enters_its_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_ENTRIES", dict(backbones()))

    @backbone(input="clip", mean=(0.5, 0.5, 0.5))
    def mine() -> SwinConfig:
        return SwinConfig(depths=(2,), heads=(1,))

    assert entry_of("mine").make() == mine() == SwinConfig(depths=(2,), heads=(1,))
    assert entry_of("mine").input == "clip"
    assert entry_of("mine").mean == (0.5, 0.5, 0.5)


def test_the_engine_does_not_know_the_backbones() -> None:
    code = (
        "import sys, pkgutil, importlib, re2tal.reversible, re2tal.reversible.families as f; "
        "[importlib.import_module('re2tal.reversible.families.' + m.name) "
        "for m in pkgutil.iter_modules(f.__path__) if m.name not in ('timm', 'transformers')]; "
        "sys.exit('re2tal.backbones' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
