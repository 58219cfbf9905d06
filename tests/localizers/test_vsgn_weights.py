"""Against the authors' release of VSGN.

`data/vsgn.safetensors` holds random weights of a small model in the release's layout, features of
two whole windows and what the release made of them, its inclusive ends moved by half a feature.
(Its group norm had four groups there, as ours for 16 channels.)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from re2tal.localizers.vsgn import VSGN, VSGNConfig
from re2tal.localizers.vsgn.heads import boundary_scores, inside_window
from re2tal.localizers.weights import load_localizer_weights, place

SMALL = VSGNConfig(width=16, levels=3, neighbours=4, head_layers=2)


def published() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and all else that the file holds."""
    content = load_file(Path(__file__).parent / "data" / "vsgn.safetensors")
    weights = {name: value for name, value in content.items() if name.startswith("module.")}
    return weights, {name: value for name, value in content.items() if name not in weights}


def loaded(weights: dict[str, Tensor]) -> VSGN:
    model = SMALL.build(4, 2).eval()
    place(model, weights, what="They")
    return model


def test_the_network_computes_what_theirs_does() -> None:
    weights, theirs = published()
    model = loaded(weights)
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


def test_the_comparison_sees_the_graph() -> None:
    weights, theirs = published()
    edges = [name for name in weights if "nconv1.mlp.weight" in name]
    assert len(edges) == 3
    for name in edges:
        changed = {**weights, name: weights[name].roll(1, dims=1)}
        logits = (
            loaded(changed).predict(theirs["features"], torch.ones(2, 64, dtype=torch.bool)).logits
        )
        assert (logits - theirs["logits"]).abs().max() > 0.01


def test_every_weight_that_does_not_fit_is_named() -> None:
    weights, _ = published()
    del weights["module.head_dec.bbox_tower.4.bias"]
    del weights["module.xGPN.levels_enc.1.nconv1.mlp.weight"]
    weights["module.head_enc.cls_logits.bias"] = torch.zeros(6)
    with pytest.raises(ValueError, match="3 do not fit") as caught:
        place(SMALL.build(4, 2), weights, what="They")
    message = str(caught.value)
    assert "head_dec.bbox_tower.4.bias is missing" in message
    assert "xGPN.levels_enc.1.nconv1.mlp.weight is missing" in message
    assert "head_enc.cls_logits.bias is unknown" in message
    with pytest.raises(ValueError, match=r"start_conv.0.weight is missing(.|\n)*and \d+ more"):
        place(SMALL.build(4, 2), {}, what="They")


def test_plain_networks_are_converted_too() -> None:
    weights, _ = published()
    plain = {
        name.removeprefix("module.").replace("tconv1", "0"): value
        for name, value in weights.items()
        if "nconv1" not in name
    }
    model = VSGNConfig(width=16, levels=3, head_layers=2, graph=False).build(4, 2)
    place(model, plain, what="They")
    given = weights["module.xGPN.levels_enc.2.tconv1.weight"]
    assert torch.equal(model.state_dict()["pyramid.encoder.2.conv.weight"], given)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("name", ["best.pth.tar", "weights.pth", "weights.safetensors"])
def test_their_checkpoints_load(name: str, graph: bool, tmp_path: Path) -> None:
    weights, _ = published()
    if not graph:
        edgeless = {name: value for name, value in weights.items() if "nconv1" not in name}
        weights = {name.replace("tconv1", "0"): value for name, value in edgeless.items()}
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(weights, path)
    elif path.suffix == ".tar":
        torch.save({"epoch": 8, "state_dict": weights, "optimizer": {"state": {}}}, path)
    else:
        torch.save(weights, path)
    model = replace(SMALL, graph=graph).build(4, 2)
    report = load_localizer_weights(model, path)
    assert set(report.placed.values()) == model.state_dict().keys()
    for theirs, ours in report.placed.items():
        assert torch.equal(model.state_dict()[ours], weights[f"module.{theirs}"])


def test_checkpoints_of_other_settings_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "best.pth.tar"
    torch.save({"state_dict": published()[0]}, path)
    cases = (
        (SMALL, 3, r"cls_logits.bias has shape \(6,\) instead of \(8,\)"),
        (replace(SMALL, levels=2), 2, r"levels_enc.2.tconv1.weight is unknown"),
        (replace(SMALL, head_layers=3), 2, r"cls_tower.6.weight is missing"),
        (replace(SMALL, graph=False), 2, r"levels_enc.0.0.weight is missing"),
    )
    for config, classes, problem in cases:
        model = config.build(4, classes)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=problem) as caught:
            load_localizer_weights(model, path)
        assert f"{path} are not those of this VSGN" in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    path.write_text("weights")
    with pytest.raises(ValueError, match="cannot be read"):
        load_localizer_weights(SMALL.build(4, 2), path)


def test_the_published_configuration_has_the_published_number_of_parameters() -> None:
    """Counted once in the authors' release, with its settings for THUMOS-14."""
    with torch.device("meta"):
        published = VSGNConfig().build(2048, 20)
        plain = VSGNConfig(graph=False).build(2048, 20)
    assert sum(p.numel() for p in published.parameters()) == 8_373_299
    assert sum(p.numel() for p in plain.parameters()) == 7_716_659
    assert published.pyramid.strides == (4, 8, 16, 32, 64)
