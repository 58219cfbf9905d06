"""Detectors in files: parts of any classes, and files that are refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from re2tal.backbones.slowfast import slowfast_toy
from re2tal.backbones.swin import swin_toy
from re2tal.localizers import ActionFormerConfig
from re2tal.trained import SPEC_FILE, DetectorSpec, load_detector, save_detector
from re2tal.videos.windows import WindowConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class NotBuilt:
    """A dataclass that builds nothing."""


def spec(**fields: Any) -> DetectorSpec:
    parts: dict[str, Any] = {
        "backbone": swin_toy(),
        "localizer": ActionFormerConfig(width=16, heads=2),
    } | fields
    return DetectorSpec(
        classes=("a", "b"), size=32, window=WindowConfig(frames=64, fps=8.0), **parts
    )


@pytest.mark.parametrize(("backbone", "reversible"), [(swin_toy(), True), (slowfast_toy(), False)])
def test_a_detector_of_any_parts_is_read_as_it_was_written(
    tmp_path: Path, backbone: object, reversible: bool
) -> None:
    written = spec(backbone=backbone, reversible=reversible)
    detector = written.build()
    save_detector(tmp_path, written, detector)
    read, copy = load_detector(tmp_path)
    assert read == written
    assert type(copy.backbone) is type(detector.backbone)
    for name, value in detector.state_dict().items():
        assert torch.equal(value, copy.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"class": "not_imported_here:Config"}, "import its module first"),
        ({"class": "re2tal.no_such_module:Config"}, "has no module"),
        ({"class": "re2tal.localizers.actionformer:math"}, "not a configuration"),
        ({"class": "os:system"}, "not a configuration"),
        ({"class": f"{__name__}:NotBuilt"}, "not a configuration"),
        ({"class": ""}, "import its module first"),
        ({"new_switch": True}, "has no new_switch"),
        ({"width": "wide"}, "width"),
        ("ActionFormer", "localizer"),
        (None, "localizer"),
        (3, "localizer"),
        ([], "localizer"),
    ],
)
def test_a_file_of_anything_but_a_component_is_refused(
    tmp_path: Path, change: object, reason: str
) -> None:
    save_detector(tmp_path, spec(), spec().build())
    content = json.loads((tmp_path / SPEC_FILE).read_text())
    whole = content["localizer"] | change if isinstance(change, dict) else change
    (tmp_path / SPEC_FILE).write_text(json.dumps(content | {"localizer": whole}))
    with pytest.raises(ValueError, match=reason):
        load_detector(tmp_path)


def test_a_class_of_a_script_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ActionFormerConfig, "__module__", "__main__")
    with pytest.raises(ValueError, match="defined in a script"):
        save_detector(tmp_path, spec(), spec().build())
