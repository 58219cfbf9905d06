"""Against ActionFormer's public implementation.

The files in `data` hold random weights of two small models in the public layout, features of three
windows (whole, padded at the end, with a gap inside) and what the public implementation made of
them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from re2tal.localizers import ActionFormer, ActionFormerConfig, Targets
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
STREAMS = ActionFormerConfig(
    width=12,
    streams=((4, 8), (2, 4)),
    stem_layers=1,
    levels=3,
    window=(5, 5, 0),
    heads=2,
    positions=16,
    dropout=0.1,
    head_width=8,
    head_layers=2,
    overlapping_ranges=True,
    label_smoothing=0.1,
    regression_weight=2.0,
    initial_normalizer=20.0,
    score_threshold=0.2,
    top_k=1000,
    min_duration=3.0,
)
MODELS = pytest.mark.parametrize(
    ("name", "config", "num_classes"),
    [("actionformer", PLAIN, 2), ("actionformer_streams", STREAMS, 1)],
)


def published(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and all else that a file holds."""
    content = load_file(DATA / f"{name}.safetensors")
    weights = {key: value for key, value in content.items() if key.startswith("module.")}
    return weights, {key: value for key, value in content.items() if key not in weights}


def loaded(weights: dict[str, Tensor], config: ActionFormerConfig, classes: int) -> ActionFormer:
    model = config.build(6, classes).eval()
    place(model, weights, what="They")
    return model


@MODELS
def test_the_network_computes_what_theirs_does(
    name: str, config: ActionFormerConfig, num_classes: int
) -> None:
    weights, theirs = published(name)
    model = loaded(weights, config, num_classes)
    logits, offsets, valid, _ = model.predict(theirs["features"], theirs["mask"])
    assert torch.equal(valid, theirs["valid"])
    assert theirs["logits"][valid].std() > 0.5
    assert (theirs["offsets"][valid] > 0).float().mean() > 0.5
    torch.testing.assert_close(logits[valid], theirs["logits"][valid], atol=1e-5, rtol=0)
    torch.testing.assert_close(offsets[valid], theirs["offsets"][valid], atol=1e-5, rtol=0)


@MODELS
def test_losses_are_theirs(name: str, config: ActionFormerConfig, num_classes: int) -> None:
    weights, theirs = published(name)
    model = loaded(weights, config, num_classes)
    model.normalizer.train()  # counts; the rest stays without randomness
    targets = [
        Targets(segments=theirs[f"segments.{i}"], labels=theirs[f"labels.{i}"]) for i in range(3)
    ]
    losses = model(theirs["features"], theirs["mask"], targets)
    regression = config.regression_weight * theirs["regression"]
    torch.testing.assert_close(losses["classification"], theirs["classification"])
    torch.testing.assert_close(losses["regression"], regression)
    torch.testing.assert_close(sum(losses.values(), torch.zeros(())), theirs["total"])
    torch.testing.assert_close(model.normalizer.mean, theirs["normalizer"])


@MODELS
def test_detections_are_theirs(name: str, config: ActionFormerConfig, num_classes: int) -> None:
    weights, theirs = published(name)
    found = loaded(weights, config, num_classes)(theirs["features"], theirs["mask"])
    for i, detections in enumerate(found):
        assert len(detections) > 10
        assert torch.equal(detections.labels, theirs[f"found.{i}.labels"])
        torch.testing.assert_close(detections.scores, theirs[f"found.{i}.scores"])
        torch.testing.assert_close(
            detections.segments, theirs[f"found.{i}.segments"], atol=5e-5, rtol=0
        )


@pytest.mark.parametrize("weights_in", ["state_dict_ema", "state_dict", None])
def test_their_checkpoints_load(weights_in: str | None, tmp_path: Path) -> None:
    weights, _ = published("actionformer")
    tables = {"module.point_generator.buffer_points.0": torch.zeros(32, 4)}
    state: object = {**weights, **tables}
    if weights_in is not None:
        other = {name: torch.zeros_like(value) for name, value in weights.items()}
        state = {
            "epoch": 35,
            "state_dict": other,
            "scheduler": {"milestones": Counter([3]), "base_lrs": [1e-4]},
            weights_in: state,
        }
    path = tmp_path / "epoch_035.pth.tar"
    torch.save(state, path)
    model = PLAIN.build(6, 2)
    report = load_localizer_weights(model, path)
    assert report.layout == "ActionFormer of its authors"
    assert set(report.left_out) == {"point_generator.buffer_points.0"}
    assert report.kept == ["normalizer.mean"]
    assert len(report.placed) == len(weights)
    expected = loaded(weights, PLAIN, 2).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.normalizer.mean == 20.0


def test_every_weight_that_does_not_fit_is_named_and_none_is_loaded(tmp_path: Path) -> None:
    weights, _ = published("actionformer")
    weights["module.backbone.rel_pe"] = torch.zeros(1)
    del weights["module.reg_head.scale.2.scale"]
    weights["module.neck.fpn_norms.0.bias"] = torch.zeros(1, 13, 1)
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    model = PLAIN.build(6, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="3 do not fit") as caught:
        load_localizer_weights(model, path)
    message = str(caught.value)
    assert str(path) in message
    assert "backbone.rel_pe is unknown" in message
    assert "reg_head.scale.2.scale is missing" in message
    assert "neck.fpn_norms.0.bias has shape (1, 13, 1) instead of (12,)" in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_for_other_classes_or_settings_are_refused(tmp_path: Path) -> None:
    weights, _ = published("actionformer")
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    classes = r"cls_head.cls_head.conv.bias has shape \(2,\) instead of \(3,\)"
    with pytest.raises(ValueError, match=classes):
        load_localizer_weights(PLAIN.build(6, 3), path)
    with pytest.raises(ValueError, match=r"backbone.proj.0.conv.bias is missing"):
        place(replace(PLAIN, streams=((4, 8), (2, 4))).build(6, 2), weights, what="They")
    weights, _ = published("actionformer_streams")
    with pytest.raises(ValueError, match=r"backbone.proj.0.conv.weight has shape \(8, 4, 1\)"):
        place(replace(STREAMS, streams=((4, 6), (2, 6))).build(6, 1), weights, what="They")
    with pytest.raises(ValueError, match=r"missing\n  \.\.\. and \d+ more"):
        place(PLAIN.build(6, 2), {}, what="They")


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    model = PLAIN.build(6, 2)
    path = tmp_path / "epoch_035.pth.tar"
    with pytest.raises(ValueError, match="cannot be read"):
        load_localizer_weights(model, path)
    torch.save({"state_dict_ema": {"a": Path("code")}}, path)
    with pytest.raises(ValueError, match="could run code") as caught:
        load_localizer_weights(model, path)
    assert "weights_only" not in str(caught.value)
    torch.save({"state_dict_ema": {"a": 1}}, path)
    with pytest.raises(ValueError, match="holds no weights"):
        load_localizer_weights(model, path)
    path.write_text("weights")
    with pytest.raises(ValueError, match="epoch_035"):
        load_localizer_weights(model, path)


def test_weights_of_our_own_detectors_load(tmp_path: Path) -> None:
    theirs, model = PLAIN.build(6, 2), PLAIN.build(6, 2)
    state = {f"localizer.{name}": value for name, value in theirs.state_dict().items()}
    save_file({**state, "backbone.norm.weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    report = load_localizer_weights(model, tmp_path / "weights.safetensors")
    assert report.left_out == {"backbone.norm.weight": "not of the localizer"}
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    save_file(expected, tmp_path / "alone.safetensors")
    alone = load_localizer_weights(PLAIN.build(6, 2), tmp_path / "alone.safetensors")
    assert alone.summary == f"names of this localizer: {len(expected)} placed, 0 left out, 0 kept"
