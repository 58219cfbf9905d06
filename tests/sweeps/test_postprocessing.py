"""Suppression and voting are searched over what a run kept, and evaluated as training does it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.config.recipe import Recipe
from pipelines.core.tracking import Run, log_recipe, start_run
from pipelines.data.plan import ACTION, Plan
from pipelines.training.detection import RAW_FILE, DetectionTask
from pipelines.training.validation import ground_truth
from re2tal.detection.raw import write_raw
from re2tal.detection.segments import Detections
from re2tal.detection.suppression import NmsConfig, nms_videos
from re2tal.errors import UserError
from sweeps.postprocessing import main
from sweeps.suggestions import override
from sweeps.suppression import search_postprocessing


def _repeated(plan: Plan) -> dict[str, Detections]:
    """Every action three times, shifted against one another, so that suppression matters."""
    random = torch.Generator().manual_seed(0)
    raw = {}
    proposed = plan.restricted((ACTION,))
    for video_id, truth in ground_truth(proposed.validation, proposed.classes).items():
        width = truth.segments[:, 1:] - truth.segments[:, :1]
        parts = [truth.segments + shift * width for shift in (0.0, 0.1, -0.15)]
        scores = 0.2 + 0.8 * torch.rand(3 * len(truth), generator=random)
        raw[video_id] = Detections(
            segments=torch.cat(parts), scores=scores, labels=truth.labels.repeat(3)
        )
    return raw


@pytest.fixture
def run(tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path) -> tuple[Run, Recipe]:
    recipe = replace(
        tiny_recipe,
        output=str(tmp_path),
        model=replace(tiny_recipe.model, class_agnostic=True),  # one class with many actions
        save_raw=True,
        nms=NmsConfig(method="none"),
    )
    run = start_run(recipe, output=tmp_path)
    log_recipe(run, recipe)
    write_raw(tmp_path / RAW_FILE, _repeated(tiny_plan), (ACTION,))
    run.client.log_artifact(run.run_id, str(tmp_path / RAW_FILE))
    run.client.set_terminated(run.run_id)
    return run, recipe


def _quality(recipe: Recipe, plan: Plan) -> float:
    task = DetectionTask(recipe=recipe, plan=plan)
    _, metrics = task.judged(nms_videos(_repeated(plan), recipe.nms))
    return metrics["val/mAP"]


def test_it_finds_what_suits_and_says_what_that_reaches(
    run: tuple[Run, Recipe], tiny_plan: Plan
) -> None:
    tracked, recipe = run
    found = search_postprocessing(tracked, trials=25, seed=0, parent=tracked.run_id)
    assert found.before == pytest.approx(_quality(recipe, tiny_plan))
    assert found.after > found.before
    assert _quality(override(recipe, found.values), tiny_plan) == pytest.approx(found.after)
    client = tracked.client
    child = client.get_run(found.run.run_id)
    assert child.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == tracked.run_id
    assert child.data.metrics["val/mAP"] == pytest.approx(found.after)
    assert child.data.params["searched.nms.method"] == found.values["nms.method"]
    assert len(client.get_metric_history(found.run.run_id, "sweep/mAP")) == 25
    assert "--nms.method" in found.options


def test_the_script_prints_options_for_training(
    run: tuple[Run, Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--run", run[0].run_id, "--trials", "5", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "average mAP" in printed
    assert "--nms.method" in printed


def test_raw_detections_of_other_videos_are_refused(
    run: tuple[Run, Recipe], tiny_plan: Plan, tmp_path: Path
) -> None:
    others = {f"v_{video_id}": found for video_id, found in _repeated(tiny_plan).items()}
    write_raw(tmp_path / RAW_FILE, others, (ACTION,))
    run[0].client.log_artifact(run[0].run_id, str(tmp_path / RAW_FILE))
    with pytest.raises(UserError, match=r'cover none of the 2 videos .* Without "v_" in front'):
        search_postprocessing(run[0], trials=1, seed=0, parent=run[0].run_id)


def test_a_run_without_raw_detections_is_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(tiny_recipe, output=str(tmp_path))
    bare = start_run(recipe, output=tmp_path)
    log_recipe(bare, recipe)
    with pytest.raises(UserError, match="--save-raw"):
        search_postprocessing(bare, trials=1, seed=0, parent=bare.run_id)
