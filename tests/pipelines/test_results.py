"""Output and pictures at the end of a run, also if its metrics did not arrive."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow.entities import LoggedModelStatus

from pipelines.config.recipe import Recipe
from pipelines.config.recipes import toy
from pipelines.core.figures import Timeline, curves
from pipelines.core.metric_log import log_metrics
from pipelines.core.storage import fetch
from pipelines.core.tracking import Run, start_run
from pipelines.data.batches import Video
from pipelines.data.plan import Plan
from pipelines.training import results
from pipelines.training.results import (
    log_model,
    log_pictures,
    name_of_model,
    print_summary,
    register,
    timelines_of,
)
from re2tal.annotations import Instance, VideoAnnotation
from re2tal.detection.segments import Detections
from re2tal.errors import UserError

SPIN = VideoAnnotation(
    video_id="a", subset="", duration=9.0, instances=(Instance(start=1.0, end=2.0, label="spin"),)
)
PLAN = Plan(
    classes=("spin",),
    training=(),
    validation=(Video(annotation=SPIN, uri=""),),
    failures={"b": "no file"},
    fingerprint="",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    output = tmp_path_factory.mktemp("results") / "runs"
    return replace(toy(), output=str(output), thresholds=(0.3, 0.5))


@pytest.fixture
def run(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return start_run(recipe, output=Path(recipe.output))


def pictures(run: Run) -> set[str]:
    return {file.path for file in run.client.list_artifacts(run.run_id, "pictures")}


def test_the_best_epoch_is_shown(
    recipe: Recipe, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    # in the order in which evaluations beside the training may end
    for step, quality in ((15, 0.5), (5, 0.25), (10, 0.75)):
        values = {"val/mAP": quality, "val/mAP/tiou_0.30": quality + 0.125, "train/loss": 1 / step}
        values |= {"val/loss": 2 / step, "train/mAP": 1.0 if step < 15 else 0.9}
        values |= {"epoch": 6 + step / 5} if step > 5 else {}
        log_metrics(run, values, step=step)
    log_metrics(run, {"val/mAP/tiou_0.50": 0.125}, step=5)  # of the other steps it was lost
    log_metrics(run, {"memory/rss_peak_mb": 123.4}, step=15)
    # all metrics of epoch 6, the first that was evaluated, were lost
    print_summary(replace(recipe, epochs=9, evaluate_from=6), PLAN, run, seconds=61.0)
    printed = capsys.readouterr().out
    assert "mAP of epoch 8 of 9, the best" in printed
    assert "0.875" in printed
    assert "overfits" not in printed  # 1.00 and 0.75
    assert "0.125" not in printed
    assert "host memory         123 MB at the peak" in printed
    assert "1 video: b (no file)" in printed
    log_pictures(run, PLAN, {})
    assert pictures(run) == {"pictures/curves.png", "pictures/timelines.png"}


@pytest.mark.parametrize(("best", "shown"), [(0.9, [0.9, 0.3]), (0.15, [0.15])])
def test_timelines_show_as_many_detections_as_there_are_instances_however_low_their_scores(
    best: float, shown: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.tensor([best, 0.3 if best > 0.3 else 0.1, 0.01])
    found = Detections(
        segments=torch.tensor([[1.0, 2.0]] * 3),
        scores=scores,
        labels=torch.zeros(3, dtype=torch.int64),
    )
    drawn: list[Timeline] = []
    monkeypatch.setattr(results, "timelines", lambda videos, _: drawn.extend(videos.values()))
    timelines_of(PLAN, {"a": found})
    timelines_of(PLAN, {})
    assert [row["score"] for row in drawn[0].found] == pytest.approx(shown)
    assert drawn[0].least == pytest.approx(min(best, 0.2))
    assert (drawn[1].found, drawn[1].least) == ([], 0.2)


@pytest.mark.parametrize(
    ("run", "model"),
    [
        ("toy-20261130-181628", "toy-epoch-8-20261130-181628"),
        ("renamed", "renamed-epoch-8"),
    ],
)
def test_a_model_bears_its_epoch_where_lists_of_models_show_it(run: str, model: str) -> None:
    assert name_of_model(run, 8) == model


def test_a_run_that_overfits_says_so_and_shows_it(
    recipe: Recipe, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (5, 10):
        log_metrics(
            run, {"val/mAP": step / 100, "train/mAP": step / 20, "train/loss": 1}, step=step
        )
    print_summary(replace(recipe, epochs=2), PLAN, run, seconds=61.0)
    printed = capsys.readouterr().out
    assert "mAP of step 10, the best" in printed  # the numbers of the epochs were not logged
    assert "overfits: 0.50 on training videos, 0.10 on validation\n" in printed
    loss, quality = [(5, 2.0), (10, 1.0)], {"average": [(5, 0.05), (10, 0.1)]}
    drawn = curves(loss, quality, validation_loss=[(5, 3.0)], watched=[(5, 0.25), (10, 0.5)])
    left, right = drawn.axes
    assert [line.get_label() for line in left.lines][1:] == ["training", "validation"]
    assert [line.get_label() for line in right.lines] == ["average", "training videos"]


def test_a_run_whose_metrics_did_not_arrive_says_so(
    recipe: Recipe, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    print_summary(recipe, PLAN, run, seconds=61.0)
    printed = capsys.readouterr().out
    assert f"No mAP arrived in MLflow: metrics that were not sent are in {recipe.output}" in printed
    assert run.run_id in printed
    assert "frames/s" not in printed
    log_pictures(run, PLAN, {})
    assert pictures(run) == {"pictures/timelines.png"}


def test_a_model_from_a_folder_with_any_name_is_logged_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = tmp_path / "a%41?b#c"  # MLflow decodes %41, in paths too
    run = start_run(toy(), output=output)
    detector = output / "checkpoint" / "detector"
    detector.mkdir(parents=True)
    (detector / "weights.safetensors").write_bytes(b"weights")
    uri = log_model(run, detector)
    found = fetch(uri, tmp_path, tracking_uri=run.uri, what="The model")
    assert (found / "artifacts" / "detector" / "weights.safetensors").read_bytes() == b"weights"


def test_a_model_is_logged_once(run: Run, tmp_path: Path, disk: Callable[[int], None]) -> None:
    detector = tmp_path / "detector"
    detector.mkdir()
    (detector / "weights.safetensors").write_bytes(b"weights" * 2**17)
    client = run.client
    experiment = client.get_run(run.run_id).info.experiment_id
    killed = client.create_logged_model(experiment, name="detector", source_run_id=run.run_id)
    assert killed.status == LoggedModelStatus.PENDING

    def models() -> list[str]:
        of_run = f"source_run_id = '{run.run_id}'"
        return [
            str(model.model_uri)
            for model in client.search_logged_models([experiment], filter_string=of_run)
        ]

    log_metrics(run, {"val/mAP": 0.5, "train/mAP": 0.75, "epoch": 1.0}, step=3)
    reached = {"val/mAP": 0.5, "train/mAP": 0.75, "epoch": 1.0, "step": 3.0}
    uri = log_model(run, detector, metrics=reached, evaluated_on="a set")
    assert models() == [uri]
    assert log_model(run, detector) == uri
    assert models() == [uri]
    for _ in range(2):
        register(run, uri, "mine")
    known = client.get_logged_model(uri.removeprefix("models:/"))
    assert {m.key: m.dataset_name for m in known.metrics or ()} == {
        "val/mAP": "a set",
        "train/mAP": None,
        "epoch": None,
    }
    (version,) = json.loads(known.tags["mlflow.modelVersions"])  # as the model's page shows it
    assert version["name"] == "mine"
    (detector / "weights.safetensors").write_bytes(b"others" * 2**17)
    disk(2**20)
    with pytest.raises(UserError, match=r"no room for the model: 33 MiB .*, 1 MiB are free"):
        log_model(run, detector)
    disk(2**30)
    assert log_model(run, detector) != uri
    assert len(models()) == 2
