"""Detectors in files: parts of any classes, and files that are refused."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from re2tal.backbones.slowfast import slowfast_toy
from re2tal.backbones.swin import swin_toy
from re2tal.errors import UserError
from re2tal.localizers import ActionFormerConfig
from re2tal.localizers.vsgn import VSGNConfig
from re2tal.trained import SPEC_FILE, WEIGHTS_FILE, DetectorSpec, load_detector, save_detector
from re2tal.videos.windows import WindowConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class NotBuilt:
    """A dataclass that builds nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnConfig:
    """A localizer of a user's own module."""

    width: int = 4

    def build(self, in_channels: int, num_classes: int) -> nn.Module:
        linear = nn.Linear(in_channels, self.width)
        nn.init.constant_(linear.bias, torch.rand(2).max().item())  # needs numbers, not shapes
        return linear


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector whose localizer is VSGN, and one beside it with ActionFormer."""
    folder = tmp_path_factory.mktemp("saved")
    for name, localizer in (
        ("vsgn", VSGNConfig(width=16, levels=3)),
        ("actionformer", ActionFormerConfig(width=16, heads=2)),
    ):
        written = spec(localizer=localizer)
        save_detector(folder / name, written, written.build())
    return folder


def rewritten(saved: Path, folder: Path, place: str, value: object) -> Path:
    """A copy of a saved detector whose specification has another value at a place."""
    copied = shutil.copytree(saved, folder / saved.name)
    content = json.loads((copied / SPEC_FILE).read_text())
    *parents, name = place.split(".")
    inner = content
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    (copied / SPEC_FILE).write_text(json.dumps(content))
    return copied


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("localizer.class", "not_imported_here:Config", "import its module first"),
        ("localizer.class", "re2tal.no_such_module:Config", "has no module"),
        ("localizer.class", "re2tal.localizers.actionformer:math", "not a configuration"),
        ("localizer.class", "os:system", "not a configuration"),
        ("localizer.class", f"{__name__}:NotBuilt", "not a configuration"),
        ("localizer.class", "", "import its module first"),
        ("localizer.new_switch", True, "has no new_switch"),
        ("localizer.width", "wide", "width"),
        ("localizer", "ActionFormer", "localizer"),
        ("localizer", None, "localizer"),
        ("localizer", 3, "localizer"),
        ("localizer", [], "localizer"),
    ],
)
def test_a_file_of_anything_but_a_component_is_refused(
    saved: Path, tmp_path: Path, place: str, value: object, reason: str
) -> None:
    folder = rewritten(saved / "actionformer", tmp_path, place, value)
    with pytest.raises(UserError, match=reason):
        load_detector(folder)


def test_a_class_of_a_script_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ActionFormerConfig, "__module__", "__main__")
    with pytest.raises(ValueError, match="defined in a script"):
        save_detector(tmp_path, spec(), spec().build())


HUGE = 10**12


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        *(
            ("actionformer", place, value)
            for place, values in {
                "backbone.embed_dim": (0, -96, HUGE, 10**30, 63, 1e300),
                "backbone.depths": ([2, 10**6], [2, 512], [0, 2], [], [2] * 10**5, [2, 2, 2]),
                "backbone.heads": ([0, 4], [2, -4], [2, 5], [2, HUGE], [2, 4, 8]),
                "backbone.patch": ([0, 8, 8], [2, 8, HUGE], [2, 8]),
                "backbone.window": ([8, 4, 0], [8, 4, HUGE], [1024, 1024, 1024]),
                "backbone.drop_path": (-0.1, 2, math.nan, "none"),
                "backbone.pooling": (0, -1, HUGE),
                "backbone.class": (
                    "re2tal.localizers.actionformer:ActionFormerConfig",
                    "re2tal.trained:DetectorSpec",
                    "re2tal.backbones.slowfast.network:SlowFastConfig",
                    "re2tal.videos.windows:WindowConfig",
                ),
                "localizer.class": (
                    "re2tal.backbones.swin:SwinConfig",
                    "re2tal.localizers.vsgn.model:VSGNConfig",
                ),
                "localizer.levels": (0, -1, 10**9, 2),
                "localizer.width": (0, -16, HUGE, 32),
                "localizer.heads": (0, -2, HUGE, 3),
                "localizer.streams": ([[6, 16]] * 10, [[6, 16]], [[0, 0], [-1, 16]]),
                "localizer.stem_layers": (10**6, 500, -1),
                "localizer.positions": (HUGE, -1),
                "localizer.window": (HUGE, 4, -1, [19] * 10**5),
                "localizer.top_k": (HUGE, 0),
                "localizer.residual_scale": (math.inf, math.nan),
                "localizer.prior": (1.5, -1),
                "localizer.empty_classes": ([5], [-1]),
                "size": (-5, 0, HUGE, 1e300, None),
                "window.frames": (HUGE, 0, -64, 63),
                "window.fps": (1e300, 0, -8, math.nan, math.inf, 1e-300),
                "window.overlap": (1 - 1e-12, -0.1, math.nan),
                "window.stitch.short": (math.nan, 0.9),
                "nms.sigma": (0, math.inf, math.nan),
                "nms.top_k": (0, 10**30),
                "std": ([0, 1, 1], [1, 1, math.nan], [1, 1], [1e-300] * 3, [-1, 1, 1]),
                "mean": ([math.inf, 0, 0], [1e300, 0, 0]),
                "classes": ([], ["a", "a"], ["a"], ["a", "b", "c"], "ab"),
                "reversible": ("maybe",),
            }.items()
            for value in values
        ),
        *(
            ("vsgn", place, value)
            for place, values in {
                "localizer.levels": (10**9, 0, 30, 2),
                "localizer.anchor_scales": ([], [math.nan], [1e-3] * 10**5, [1.0]),
                "localizer.stem_stride": (0, HUGE),
                "localizer.neighbours": (HUGE, 1),
            }.items()
            for value in values
        ),
    ],
    ids=lambda value: f"{value!s:.40}",
)
def test_a_specification_of_no_detector_is_refused_at_once(
    saved: Path, tmp_path: Path, kind: str, place: str, value: object
) -> None:
    folder = rewritten(saved / kind, tmp_path, place, value)
    with pytest.raises(UserError) as caught:
        load_detector(folder)
    assert str(caught.value).startswith(str(folder))
    assert torch.is_grad_enabled()


def changed(name: str, value: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """A function that changes a weight, or takes it out."""

    def change(state: dict[str, torch.Tensor]) -> None:
        new = value(state.pop(name))
        if new is not None:
            state[name] = new

    return change


ONE = "localizer.class_head.last.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed(ONE, lambda t: t * math.nan), f"1 weights are not finite .*: {ONE}"),
        (changed(ONE, lambda t: t / 0), "not finite"),
        (changed(ONE, lambda t: t.to(torch.int8)), f"{ONE} must be floating .* but is integers"),
        (changed(ONE, lambda t: t[None]), f"{ONE} must be .* of shape .* but is .* of shape"),
        (changed(ONE, lambda _: None), f"{ONE} is missing"),
        (lambda state: state.update(other=torch.zeros(2)), "other is not part of the detector"),
        (lambda state: state.clear(), "no detector can be built|is missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    saved: Path, tmp_path: Path, change: Callable[[Any], None], reason: str
) -> None:
    folder = shutil.copytree(saved / "actionformer", tmp_path / "detector")
    state = load_file(folder / WEIGHTS_FILE)
    change(state)
    save_file(state, folder / WEIGHTS_FILE)
    with pytest.raises(UserError, match=reason) as caught:
        load_detector(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", [SPEC_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{}", b"[" * 10**5, b"\xff\xfe", b"1" * 5000]
)
def test_files_of_another_kind_are_refused(
    saved: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    folder = shutil.copytree(saved / "actionformer", tmp_path / "detector")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_detector(folder)


def test_a_part_of_ones_own_is_built_before_its_weights_are_compared(tmp_path: Path) -> None:
    written = spec(localizer=OwnConfig())
    detector = written.build()
    save_detector(tmp_path, written, detector)
    _, read = load_detector(tmp_path)
    assert torch.equal(read.localizer.bias, detector.localizer.bias)
    state = detector.state_dict()
    save_file({name: state[name] for name in state if "bias" not in name}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(UserError, match=r"(?s)does not fit spec\.json.*localizer\.bias"):
        load_detector(tmp_path)


def test_weights_in_half_precision_are_read(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "vsgn", tmp_path / "detector")
    state = load_file(folder / WEIGHTS_FILE)
    halves = {n: v.bfloat16() if v.is_floating_point() else v for n, v in state.items()}
    save_file(halves, folder / WEIGHTS_FILE)
    _, detector = load_detector(folder)
    for name, value in detector.state_dict().items():
        assert torch.equal(value, halves[name].to(value.dtype))
