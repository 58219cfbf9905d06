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


@pytest.mark.parametrize("backbone", [swin_toy(), slowfast_toy()])
def test_a_detector_of_any_parts_is_read_as_it_was_written(
    tmp_path: Path, backbone: object
) -> None:
    written = spec(backbone=backbone)
    detector = written.build()
    save_detector(tmp_path, written, detector)
    read, copy = load_detector(tmp_path)
    assert read == written
    assert type(copy.backbone) is type(detector.backbone)
    for name, value in detector.state_dict().items():
        assert torch.equal(value, copy.state_dict()[name])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("not_imported_here:Config", "import its module first"),
        ("re2tal.no_such_module:Config", "has no module"),
        ("re2tal.localizers.actionformer:math", "not a configuration"),
        ("os:system", "not a configuration"),
        (f"{__name__}:NotBuilt", "not a configuration"),
        ("", "import its module first"),
    ],
)
def test_other_classes_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    save_detector(tmp_path, spec(), spec().build())
    content = json.loads((tmp_path / SPEC_FILE).read_text())
    content["localizer"]["class"] = name
    (tmp_path / SPEC_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=reason):
        load_detector(tmp_path)


@pytest.mark.parametrize("value", ["ActionFormer", None, 3, []])
def test_what_is_no_component_is_refused(tmp_path: Path, value: object) -> None:
    save_detector(tmp_path, spec(), spec().build())
    content = json.loads((tmp_path / SPEC_FILE).read_text())
    content["localizer"] = value
    (tmp_path / SPEC_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="localizer"):
        load_detector(tmp_path)


def test_a_field_that_this_version_does_not_know_is_refused(tmp_path: Path) -> None:
    save_detector(tmp_path, spec(), spec().build())
    content = json.loads((tmp_path / SPEC_FILE).read_text())
    content["localizer"]["new_switch"] = True
    (tmp_path / SPEC_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no new_switch"):
        load_detector(tmp_path)


def test_a_class_of_a_script_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ActionFormerConfig, "__module__", "__main__")
    with pytest.raises(ValueError, match="defined in a script"):
        save_detector(tmp_path, spec(), spec().build())


def test_a_field_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    save_detector(tmp_path, spec(), spec().build())
    content = json.loads((tmp_path / SPEC_FILE).read_text())
    content["localizer"]["width"] = "wide"
    (tmp_path / SPEC_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="width"):
        load_detector(tmp_path)
