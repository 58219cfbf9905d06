"""Public implementations of ActionFormer, TriDet and VSGN: what they compute; their checkpoints.

The files in `data` hold random weights of small models in the public layouts, features and what
the public implementations made of them: for ActionFormer three windows (whole, padded at the end,
with a gap inside), for TriDet two whole windows (`published_tridet.py` wrote them), for VSGN too,
its inclusive ends moved by half a feature. (VSGN's group norm had four groups there, as ours for 16
channels.)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from re2tal.localizers import ActionFormerConfig, Targets, TriDetConfig
from re2tal.localizers.vsgn import VSGNConfig
from re2tal.localizers.vsgn.heads import boundary_scores, inside_window
from re2tal.localizers.weights import load_localizer_weights, place

DATA = Path(__file__).parent / "data"
PLAIN = ActionFormerConfig(
    width=12,
    stem_layers=1,
    levels=3,
    window=5,
    heads=2,
    head_width=8,
    initial_normalizer=20.0,
    score_threshold=0.05,
    top_k=15,
    min_duration=1.0,
)
STREAMS = replace(
    PLAIN,
    streams=((4, 8), (2, 4)),
    window=(5, 5, 0),
    positions=16,
    dropout=0.1,
    head_layers=2,
    overlapping_ranges=True,
    label_smoothing=0.1,
    regression_weight=2.0,
    score_threshold=0.2,
    top_k=1000,
    min_duration=3.0,
)
TRIDET = TriDetConfig(
    width=32,
    stem_layers=1,
    levels=3,
    window=3,
    widening=1.5,
    mlp_width=24,
    head_width=8,
    bins=4,
    iou_power=0.5,
    label_smoothing=0.1,
    regression_weight=2.0,
    initial_normalizer=20.0,
    score_threshold=0.05,
    top_k=15,
    min_duration=1.0,
)
VSGN = VSGNConfig(width=16, levels=3, neighbours=4, head_layers=2)
EDGELESS = replace(VSGN, graph=False)
CHANNELS = {ActionFormerConfig: 6, TriDetConfig: 6, VSGNConfig: 4}


def published(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and all else that a file holds."""
    content = load_file(DATA / f"{name}.safetensors")
    weights = {key: value for key, value in content.items() if key.startswith("module.")}
    return weights, {key: value for key, value in content.items() if key not in weights}


def edgeless() -> dict[str, Tensor]:
    """Weights of the release's network without the graph."""
    weights, _ = published("vsgn")
    return {
        name.replace("tconv1", "0"): value
        for name, value in weights.items()
        if "nconv1" not in name
    }


def build(config: Any, classes: int = 2) -> Any:
    return config.build(CHANNELS[type(config)], classes)


def loaded(weights: dict[str, Tensor], config: Any, classes: int = 2) -> Any:
    model = build(config, classes).eval()
    place(model, weights, what="They")
    return model


# What the networks compute


@pytest.mark.parametrize(
    ("name", "config", "num_classes"),
    [("actionformer", PLAIN, 2), ("actionformer_streams", STREAMS, 1), ("tridet", TRIDET, 2)],
)
def test_actionformer_and_tridet_compute_what_theirs_do(
    name: str, config: ActionFormerConfig | TriDetConfig, num_classes: int
) -> None:
    weights, theirs = published(name)
    model = loaded(weights, config, num_classes)
    features, mask = theirs["features"], theirs["mask"]
    logits, offsets, valid, _ = model.predict(features, mask)
    assert torch.equal(valid, theirs["valid"])
    assert theirs["logits"][valid].std() > 0.5
    assert (theirs["offsets"][valid] > 0).float().mean() > 0.5
    torch.testing.assert_close(logits[valid], theirs["logits"][valid], atol=1e-5, rtol=0)
    torch.testing.assert_close(offsets[valid], theirs["offsets"][valid], atol=1e-5, rtol=0)
    for i, detections in enumerate(model(features, mask)):
        assert len(detections) > 10
        assert torch.equal(detections.labels, theirs[f"found.{i}.labels"])
        torch.testing.assert_close(detections.scores, theirs[f"found.{i}.scores"])
        torch.testing.assert_close(
            detections.segments, theirs[f"found.{i}.segments"], atol=5e-5, rtol=0
        )
    model.normalizer.train()  # counts; the rest stays without randomness
    targets = [
        Targets(segments=theirs[f"segments.{i}"], labels=theirs[f"labels.{i}"])
        for i in range(len(features))
    ]
    losses = model(features, mask, targets)
    regression = config.regression_weight * theirs["regression"]
    torch.testing.assert_close(losses["classification"], theirs["classification"])
    torch.testing.assert_close(losses["regression"], regression)
    torch.testing.assert_close(sum(losses.values(), torch.zeros(())), theirs["total"])
    torch.testing.assert_close(model.normalizer.mean, theirs["normalizer"])


def test_vsgn_computes_what_theirs_does() -> None:
    weights, theirs = published("vsgn")
    model = loaded(weights, VSGN)
    mask = torch.ones(2, 64, dtype=torch.bool)
    predicted = model.predict(theirs["features"], mask)
    regression = model.segment_head(*model.pyramid(theirs["features"], mask))
    for name, ours in (
        ("logits", predicted.logits),
        ("regression", regression),
        ("segments", predicted.segments),
        ("adjusted", predicted.adjusted),
        ("scores", predicted.yes.exp()),
        ("boundary_scores", boundary_scores(predicted.yes, inside_window(predicted.adjusted, 64))),
    ):
        assert theirs[name].std() > 0.002, name
        torch.testing.assert_close(ours, theirs[name], atol=1e-5, rtol=0, msg=name)
    torch.testing.assert_close(predicted.no.exp(), 1 - theirs["scores"], atol=1e-5, rtol=0)
    assert (theirs["adjusted"] - theirs["segments"]).std() > 0.5
    assert (theirs["segments"][..., 0] < -0.5).any()  # the window's ends are met
    edges = [name for name in weights if "nconv1.mlp.weight" in name]
    assert len(edges) == 3
    for name in edges:  # the comparison sees every edge of the graph
        changed = loaded({**weights, name: weights[name].roll(1, dims=1)}, VSGN)
        logits = changed.predict(theirs["features"], mask).logits
        assert (logits - theirs["logits"]).abs().max() > 0.01


# Files


@pytest.mark.parametrize(
    "config", [PLAIN, TRIDET, VSGN, EDGELESS], ids=["actionformer", "tridet", "vsgn", "plain"]
)
@pytest.mark.parametrize(
    "file", ["state_dict_ema", "state_dict", "weights.pth", "weights.safetensors"]
)
def test_their_checkpoints_load(file: str, config: Any, tmp_path: Path) -> None:
    name, title = {
        ActionFormerConfig: ("actionformer", "ActionFormer of its authors"),
        TriDetConfig: ("tridet", "TriDet of its authors"),
    }.get(type(config), ("vsgn", None))
    weights, _ = published(name)
    weights = edgeless() if config is EDGELESS else weights
    tables: dict[str, Tensor] = {}
    if title:
        tables["module.point_generator.buffer_points.0"] = torch.zeros(32, 4)
    state = {**weights, **tables}
    path = tmp_path / (file if "." in file else "epoch_035.pth.tar")
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".pth":
        torch.save(state, path)
    else:
        content = {
            "epoch": 35,
            "state_dict": {name: torch.zeros_like(value) for name, value in weights.items()},
            "scheduler": {"milestones": Counter([3]), "base_lrs": [1e-4]},
            file: state,
        }
        torch.save(content, path)
    model = build(config)
    report = load_localizer_weights(model, path)
    assert set(report.left_out) == {name.removeprefix("module.") for name in tables}
    found = model.state_dict()
    if title:
        assert report.layout == title
        assert report.kept == ["normalizer.mean"]
        assert model.normalizer.mean == 20.0
        assert len(report.placed) == len(weights)
        expected = loaded(weights, config).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    else:
        assert set(report.placed.values()) == found.keys()
        for theirs, ours in report.placed.items():
            assert torch.equal(found[ours], weights[f"module.{theirs}"])


def misfits() -> list[Any]:
    """Weights, the settings that they do not fit, the number of classes and the problems."""
    plain, streams, tridet, vsgn = (
        published(name)[0] for name in ("actionformer", "actionformer_streams", "tridet", "vsgn")
    )
    broken = {**plain, "module.backbone.rel_pe": torch.zeros(1)}
    broken["module.neck.fpn_norms.0.bias"] = torch.zeros(1, 13, 1)
    del broken["module.reg_head.scale.2.scale"]
    damaged = {**vsgn, "module.head_enc.cls_logits.bias": torch.zeros(6)}
    del damaged["module.head_dec.bbox_tower.4.bias"]
    del damaged["module.xGPN.levels_enc.1.nconv1.mlp.weight"]
    return [
        (
            broken,
            (PLAIN, 2),
            [
                "3 do not fit",
                "backbone.rel_pe is unknown",
                "reg_head.scale.2.scale is missing",
                "neck.fpn_norms.0.bias has shape (1, 13, 1) instead of (12,)",
            ],
        ),
        (
            damaged,
            (VSGN, 2),
            [
                "3 do not fit",
                "head_dec.bbox_tower.4.bias is missing",
                "xGPN.levels_enc.1.nconv1.mlp.weight is missing",
                "head_enc.cls_logits.bias is unknown",
            ],
        ),
        (plain, (PLAIN, 3), ["cls_head.cls_head.conv.bias has shape (2,) instead of (3,)"]),
        (
            plain,
            (replace(PLAIN, streams=((4, 8), (2, 4))), 2),
            ["backbone.proj.0.conv.bias is missing"],
        ),
        (
            streams,
            (replace(STREAMS, streams=((4, 6), (2, 6))), 1),
            ["backbone.proj.0.conv.weight has shape (8, 4, 1)"],
        ),
        (vsgn, (VSGN, 3), ["cls_logits.bias has shape (6,) instead of (8,)", "of this VSGN"]),
        (vsgn, (replace(VSGN, levels=2), 2), ["levels_enc.2.tconv1.weight is unknown"]),
        (vsgn, (replace(VSGN, head_layers=3), 2), ["cls_tower.6.weight is missing"]),
        (vsgn, (EDGELESS, 2), ["levels_enc.0.0.weight is missing"]),
        ({"module.a": torch.zeros(1)}, (PLAIN, 2), ["is missing\n  ... and ", " more"]),
        (tridet, (TRIDET, 3), ["start_head.cls_head.conv.bias has shape (2,) instead of (3,)"]),
        (tridet, (replace(TRIDET, bins=5), 2), ["reg_head.offset_head.conv.bias has shape (10,)"]),
        (tridet, (replace(TRIDET, levels=4), 2), ["backbone.branch.2.global_fc.weight is missing"]),
        ({"module.a": torch.zeros(1)}, (VSGN, 2), ["start_conv.0.weight is missing", " more"]),
    ]


@pytest.mark.parametrize(("weights", "settings", "problems"), misfits())
def test_every_weight_that_does_not_fit_is_named_and_none_is_loaded(
    weights: dict[str, Tensor], settings: tuple[Any, int], problems: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    model = build(*settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit") as caught:
        load_localizer_weights(model, path)
    for problem in (str(path), *problems):
        assert problem in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_our_own_detectors_load(tmp_path: Path) -> None:
    theirs, model = build(PLAIN), build(PLAIN)
    state = {f"localizer.{name}": value for name, value in theirs.state_dict().items()}
    save_file({**state, "backbone.norm.weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    report = load_localizer_weights(model, tmp_path / "weights.safetensors")
    assert report.left_out == {"backbone.norm.weight": "not of the localizer"}
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    save_file(expected, tmp_path / "alone.safetensors")
    alone = load_localizer_weights(build(PLAIN), tmp_path / "alone.safetensors")
    assert alone.summary == f"names of this localizer: {len(expected)} placed, 0 left out, 0 kept"
