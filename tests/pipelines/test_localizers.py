"""Training loop with every localizer, and with one from outside the project's package."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines.config.recipe import Recipe
from pipelines.core.models import with_weights_here
from pipelines.data.inputs import detection_inputs
from pipelines.data.plan import Plan
from pipelines.training.activations import activation_metrics
from pipelines.training.detection import DETECTIONS_FILE, RAW_FILE, DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.model import build_detector
from pipelines.training.run import check_model
from pipelines.training.trainer import Trainer
from re2tal.detection.raw import read_raw
from re2tal.detection.video_scores import VideoScores
from re2tal.errors import UserError
from re2tal.inference import detect
from re2tal.localizers.protocol import LocalizerConfig
from re2tal.localizers.vsgn import VSGNConfig
from re2tal.trained import load_detector
from re2tal.videos.stitching import StitchConfig
from tests.localizers.small import TRIDET
from tests.localizers.tiny import Tiny, TinyConfig

VSGN = VSGNConfig(width=16, levels=3, stem_stride=1, head_layers=1, neighbours=4)


def run(recipe: Recipe, plan: Plan, folder: Path) -> tuple[dict[str, float], Path]:
    """Train; return the last metrics and the folder of the last checkpoint."""
    runtime = LocalRuntime(recipe, plan, folder)
    metrics = Trainer(
        DetectionTask(recipe=recipe, plan=plan),
        runtime,
        weights=None,
        output=str(folder / "output"),
    ).run()
    assert all(math.isfinite(m["train/loss"]) for _, m in runtime.history if "train/loss" in m)
    return metrics, folder / "checkpoint"


def with_localizer(
    recipe: Recipe, localizer: LocalizerConfig, *, class_agnostic: bool = False
) -> Recipe:
    model = replace(recipe.model, localizer=localizer, class_agnostic=class_agnostic)
    return replace(recipe, model=model)


@pytest.mark.parametrize(
    "localizer", [VSGN, TRIDET, TinyConfig()], ids=["vsgn", "tridet", "one of a user's"]
)
def test_it_trains_detects_and_is_saved(
    localizer: LocalizerConfig, tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    recipe = with_localizer(tiny_recipe, localizer)
    metrics, checkpoint = run(recipe, tiny_plan, tmp_path)
    assert 0 <= metrics["val/mAP"] <= 1
    spec, detector = load_detector(checkpoint / "detector")
    assert spec.localizer == localizer
    found = detect(tiny_plan.validation[0].uri, (spec, detector))
    assert len(found) > 0
    predicted = activation_metrics(recipe, build_detector(recipe, tiny_plan.classes, weights=None))
    assert predicted["memory/predicted_activations_mb"] == pytest.approx(
        predicted["memory/measured_activations_mb"], rel=0.05
    )


def test_a_localizer_without_a_part_is_refused_before_the_training(
    tiny_recipe: Recipe, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Tiny, "decode")
    monkeypatch.delattr(Tiny, "losses")
    with pytest.raises(UserError, match=r"^Tiny is not a localizer: it has no losses, no decode\."):
        build_detector(with_localizer(tiny_recipe, TinyConfig()), tiny_plan.classes, weights=None)


def test_a_localizer_begins_with_given_weights(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = with_localizer(tiny_recipe, VSGN)
    detector = build_detector(recipe, tiny_plan.classes, weights=None)
    path = tmp_path / "weights.safetensors"
    save_file(detector.state_dict(), path)
    names = {name for name in detector.state_dict() if name.startswith("localizer.")}
    recipe = detection_inputs(
        replace(recipe, model=replace(recipe.model, localizer_weights=str(path)))
    )
    torch.manual_seed(7)
    checked = check_model(recipe, tiny_plan.classes)
    assert f"names of this localizer: {len(names)} placed" in capsys.readouterr().out
    with_weights = with_weights_here(recipe, tmp_path, tracking_uri=None)
    built = DetectionTask(recipe=with_weights, plan=tiny_plan).build(None)
    for other in (checked, built):
        for name, value in detector.state_dict().items():
            random = name.startswith("backbone.") and name.endswith("qkv.weight")
            if name in names or random:
                assert torch.equal(value, other.state_dict()[name]) is (name in names), name
    with pytest.raises(UserError, match=r"The weights in .* are not those of this VSGN"):
        check_model(recipe, (*tiny_plan.classes, "one more"))
    lost = replace(recipe.model, localizer_weights=str(tmp_path / "lost.pth"))
    with pytest.raises(UserError, match=r"The localizer's weights: .*--model.localizer-weights"):
        detection_inputs(replace(recipe, model=lost))


def test_it_trains_on_stitched_windows(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    window = replace(tiny_recipe.data.window, stitch=StitchConfig(enabled=True))
    recipe = replace(tiny_recipe, data=replace(tiny_recipe.data, window=window))
    runtime = LocalRuntime(recipe, tiny_plan, tmp_path)
    task = DetectionTask(recipe=with_localizer(recipe, VSGN), plan=tiny_plan)
    trainer = Trainer(task, runtime, weights=None, output=str(tmp_path / "output"))
    windows = trainer._windows(0)
    stitched = [w for w in windows if w.copy]
    assert 0 < len(stitched) < len(windows)
    (batch,) = runtime.stream(stitched[:1], size=recipe.data.size)
    (mask,) = batch.mask.numpy()
    assert (mask == stitched[0].mask()).all()
    assert mask[-1]  # the copy, behind the gap
    assert not mask.all()
    shown = batch.frames[0].flatten(1).any(dim=1).numpy()
    assert (shown == mask).all()
    assert len(batch.targets[0].labels) == len(stitched[0].labels) > 0
    assert 0 <= trainer.run()["val/mAP"] <= 1


@pytest.mark.parametrize("scored", [False, True], ids=["proposals", "classified"])
def test_a_class_agnostic_detector_makes_proposals(
    scored: bool, tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    recipe = replace(with_localizer(tiny_recipe, VSGN, class_agnostic=True), save_raw=True)
    if scored:
        classes = len(tiny_plan.classes)
        scores = {
            video.annotation.video_id: torch.linspace(0.1, 0.9, classes)
            for video in tiny_plan.validation
        }
        recipe = replace(recipe, data=replace(recipe.data, video_scores="scores.json"))
        tiny_plan = replace(
            tiny_plan, video_scores=VideoScores(classes=tiny_plan.classes, scores=scores)
        )
    metrics, checkpoint = run(recipe, tiny_plan, tmp_path)
    assert 0 <= metrics["val/AR_AUC"] <= 100
    detector = load_detector(checkpoint / "detector")[1]
    assert detector.num_classes == 1
    rows = json.loads((checkpoint / DETECTIONS_FILE).read_text())["results"]
    labels = {row["label"] for found in rows.values() for row in found}
    assert labels == (set(tiny_plan.classes[-2:]) if scored else {"action"})
    raw, classes_of_raw = read_raw(checkpoint / RAW_FILE)
    assert classes_of_raw == ("action",)
    assert raw.keys() == rows.keys()
    assert all(len(raw[video]) > 0 for video in rows)
