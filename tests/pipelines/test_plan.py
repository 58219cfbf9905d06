"""Plan of a run: problems that stop it, and problems that only exclude a video."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pipelines import evaluate, extract_features, prepare, probe, train
from pipelines.config.clip_recipes import finetuning
from pipelines.config.recipe import DataConfig, FinetuneConfig, Recipe
from pipelines.data.clip_plan import read_lists
from pipelines.data.plan import check_failures, make_plan, read_annotations
from pipelines.inference.evaluation import evaluated_plan
from pipelines.inference.options import EvaluateConfig
from re2tal.annotations import AnnotationError
from re2tal.datasets import load_annotations
from re2tal.errors import UserError
from re2tal.json_files import FileError
from re2tal.videos.augmentation import AugmentationConfig


def test_every_problem_of_the_annotations_is_listed(tiny_recipe: Recipe, tmp_path: Path) -> None:
    def entry(start: Any, end: Any) -> dict[str, Any]:
        instance = {"segment": [start, end], "label": "spin"}
        return {"subset": "training", "duration": 10.0, "annotations": [instance]}

    database = {
        "nan": entry(float("nan"), 3.0),
        "negative": entry(-2.0, 3.0),
        "reversed": entry(5.0, 3.0),
        "past": entry(5.0, 300.0),
        "../outside": entry(1.0, 3.0),
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"database": database}))
    with pytest.raises(AnnotationError) as caught:
        read_annotations(replace(tiny_recipe.data, annotations=str(path)))
    for video_id in database:
        assert video_id in str(caught.value), video_id


def test_failures_up_to_the_share_are_tolerated() -> None:
    check_failures({"a": "damaged"}, total=20, max_failed=0.05)
    check_failures({}, total=1, max_failed=0.0)
    with pytest.raises(UserError, match=r"2 of 20 videos .* more than the allowed 5%"):
        check_failures({"a": "damaged", "b": "gone"}, total=20, max_failed=0.05)


def test_no_usable_video_at_all_is_an_error_whatever_the_share() -> None:
    with pytest.raises(UserError, match=r"No usable video: 2 of 2"):
        check_failures({"a": "damaged", "b": "gone"}, total=2, max_failed=1.0)


@pytest.fixture
def without_durations(tiny_recipe: Recipe, tmp_path: Path) -> tuple[DataConfig, dict[str, float]]:
    """Tiny set in the form in which THUMOS-14 is shared, and the durations."""
    document = json.loads(Path(str(tiny_recipe.data.annotations)).read_text())
    durations = {name: entry.pop("duration") for name, entry in document["database"].items()}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(document))
    return replace(tiny_recipe.data, annotations=str(path)), durations


def test_durations_come_from_a_file_or_from_the_videos(
    without_durations: tuple[DataConfig, dict[str, float]], tiny_set: Path, tmp_path: Path
) -> None:
    config, durations = without_durations
    with pytest.raises(AnnotationError, match=r"5 problems(?s:.*)duration: is missing"):
        read_annotations(config)
    (path := tmp_path / "durations.json").write_text(json.dumps(durations))
    given = read_annotations(replace(config, durations=str(path)))
    assert given == load_annotations(tiny_set / "annotations.json")
    assert {v.video_id: v.duration for v in given.videos} == durations
    probed = read_annotations(replace(config, durations="probe"))
    assert {v.video_id: v.duration for v in probed.videos} == pytest.approx(durations, abs=0.1)
    # an excluded video is not opened
    videos = shutil.copytree(tiny_set / "videos", tmp_path / "videos")
    (videos / "toy_000.mp4").unlink()
    (videos / "toy_001.mp4").write_text("this is no video")
    fewer = replace(config, durations="probe", videos=str(videos))
    reasons = r"toy_000 \(there is no file toy_000 .*\); toy_001 \(.*\)\. Leave them out"
    with pytest.raises(UserError, match=rf"2 of 5 videos without an annotated .*: {reasons}"):
        read_annotations(fewer)
    (lost := tmp_path / "lost.txt").write_text("toy_000\ntoy_001")
    assert len(read_annotations(replace(fewer, exclude=str(lost))).videos) == 3
    with pytest.raises(UserError, match=r"The videos: no path given\. .*--data\.videos"):
        read_annotations(replace(fewer, videos=None))


def test_durations_come_from_features_in_place_of_videos(
    without_durations: tuple[DataConfig, dict[str, float]], tmp_path: Path
) -> None:
    config, durations = without_durations
    entry = {"file": "", "length": 100, "fps": 12.0, "stride": 2, "offset": 0.0}
    entries = {name: {**entry, "duration": seconds} for name, seconds in durations.items()}
    said = {"format": "re2tal features 1", "layout": "npy", "channels": 8, "videos": entries}
    (tmp_path / "features.json").write_text(json.dumps(said))
    config = replace(config, videos=None, features=str(tmp_path), durations="probe")
    assert {v.video_id: v.duration for v in read_annotations(config).videos} == durations


def test_durations_come_from_features_of_the_same_name_in_another_normal_form(
    without_durations: tuple[DataConfig, dict[str, float]], tmp_path: Path
) -> None:
    action = {"segment": [1.0, 2.0], "label": "run"}
    entry = {"subset": "training", "annotations": [action]}
    (tmp_path / "a.json").write_text(json.dumps({"database": {"caf\u00e9": entry}}))
    held = {"file": "", "length": 9, "fps": 12.0, "stride": 2, "offset": 0.0, "duration": 7.5}
    said = {"format": "re2tal features 1", "layout": "npy", "channels": 8}
    said |= {"videos": {"cafe\u0301": held}}
    (tmp_path / "features.json").write_text(json.dumps(said))
    config = replace(
        without_durations[0],
        annotations=str(tmp_path / "a.json"),
        videos=None,
        features=str(tmp_path),
        durations="probe",
    )
    (video,) = read_annotations(config).videos
    assert (video.video_id, video.duration) == ("caf\u00e9", 7.5)


@pytest.mark.parametrize("script", [evaluate, extract_features, prepare, probe, train])
def test_every_script_that_reads_annotations_takes_durations(script: Any) -> None:
    prefix = ["toy", "--data."] if script is train else ["--"]
    config = script.parse([*prefix[:-1], f"{prefix[-1]}durations", "probe"])
    assert getattr(config, "data", config).durations == "probe"


def test_labels_are_trimmed_when_asked_for(tiny_recipe: Recipe, tmp_path: Path) -> None:
    document = json.loads(Path(str(tiny_recipe.data.annotations)).read_text())
    first, *_ = (i for entry in document["database"].values() for i in entry["annotations"])
    label, first["label"] = first["label"], f"{first['label']} "
    (path := tmp_path / "a.json").write_text(json.dumps(document))
    config = replace(tiny_recipe.data, annotations=str(path))
    with pytest.raises(AnnotationError, match=rf"'{label}' \(.*'{label} ' .*--data\.trim-labels"):
        read_annotations(config)
    trimmed = read_annotations(replace(config, trim_labels=True))
    assert trimmed.classes == read_annotations(tiny_recipe.data).classes
    assert [repair.action for repair in trimmed.repairs] == ["trimmed"]


@pytest.fixture
def damaged(tiny_recipe: Recipe, tiny_set: Path, tmp_path: Path) -> DataConfig:
    """Tiny set with one training video missing and one unreadable."""
    folder = tmp_path / "videos"
    shutil.copytree(tiny_set / "videos", folder)
    (folder / "toy_000.mp4").unlink()
    (folder / "toy_001.mp4").write_text("this is no video")
    return replace(tiny_recipe.data, videos=str(folder))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_missing_and_unreadable_videos_are_left_out_and_named(damaged: DataConfig) -> None:
    config = replace(damaged, max_failed=0.5)
    plan = make_plan(config, read_annotations(config))
    assert set(plan.failures) == {"toy_000", "toy_001"}
    assert "no file" in plan.failures["toy_000"]
    assert "toy_001.mp4" in plan.failures["toy_001"]
    assert [v.annotation.video_id for v in plan.training] == ["toy_002"]
    assert len(plan.validation) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_too_many_of_them_stop_the_run(damaged: DataConfig) -> None:
    with pytest.raises(UserError, match=r"2 of 5 videos") as caught:
        make_plan(damaged, read_annotations(damaged))
    assert "toy_000" in str(caught.value)
    assert "toy_001" in str(caught.value)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_a_subset_without_a_usable_video_is_an_error(damaged: DataConfig) -> None:
    (Path(str(damaged.videos)) / "toy_002.mp4").unlink()
    config = replace(damaged, max_failed=0.9)
    with pytest.raises(UserError, match=r"No usable video in subset 'training'"):
        make_plan(config, read_annotations(config))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_a_validation_without_instances_is_an_error_before_training(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    document = json.loads(Path(str(tiny_recipe.data.annotations)).read_text())
    for entry in document["database"].values():
        if entry["subset"] == "validation":
            entry["annotations"] = []
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(document))
    config = replace(tiny_recipe.data, annotations=str(path))
    with pytest.raises(UserError, match=r"No instance .* in subset 'validation': its 2 usable"):
        make_plan(config, read_annotations(config))


def changed(config: DataConfig, folder: Path, **duration: float) -> DataConfig:
    """Return the data set with annotated durations that differ from its files."""
    document = json.loads(Path(str(config.annotations)).read_text())
    for video_id, seconds in duration.items():
        document["database"][video_id]["duration"] = seconds
        document["database"][video_id]["annotations"].append(
            {"segment": [seconds - 1, seconds + 5], "label": "spin"}
        )
    path = folder / "annotations.json"
    path.write_text(json.dumps(document))
    return replace(config, annotations=str(path))


def test_faults_of_the_data_set_and_a_list_of_videos_to_exclude(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    config = changed(tiny_recipe.data, tmp_path, toy_000=30.0)
    with pytest.raises(AnnotationError, match="reaches past"):
        read_annotations(config)
    plain = read_annotations(tiny_recipe.data)
    repaired = read_annotations(replace(config, dataset="activitynet-1.3"))
    assert len(repaired.repairs) == 1
    listed = tmp_path / "missing.txt"
    listed.write_text("toy_000\n")
    rest = read_annotations(replace(config, exclude=str(listed)))
    assert {v.video_id for v in plain.videos} - {v.video_id for v in rest.videos} == {"toy_000"}
    assert len({a.fingerprint for a in (plain, repaired, rest)}) == 3


def test_a_video_that_the_data_set_leaves_out_can_be_kept(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    document = json.loads(Path(str(tiny_recipe.data.annotations)).read_text())
    database = document["database"]
    database["video_test_0001496"] = database.pop("toy_000")
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(document))
    config = replace(tiny_recipe.data, annotations=str(path), dataset="thumos-14")
    (left_out,) = read_annotations(config).excluded
    assert left_out.video_id == "video_test_0001496"
    kept = read_annotations(replace(config, keep=("video_test_0001496",)))
    assert kept.excluded == ()
    assert len(kept.videos) == len(database)


def test_the_option_that_names_another_subset_is_named(tiny_recipe: Recipe) -> None:
    config = replace(tiny_recipe.data, validation_subset="val")
    finetuned = finetuning(replace(tiny_recipe, data=config, finetune=FinetuneConfig(epochs=1)))
    evaluated = EvaluateConfig(annotations=config.annotations, subset="val")
    plans: list[tuple[Callable[[], object], str]] = [
        (lambda: make_plan(config, read_annotations(config)), "--data.validation-subset"),
        (lambda: read_lists(finetuned.data), "--data.validation-subset"),
        (lambda: evaluated_plan(evaluated), "--subset"),
    ]
    for plan, option in plans:
        with pytest.raises(AnnotationError, match=rf"'val'; .* Name one of them with {option}$"):
            plan()


def test_shards_are_judged_by_the_rate_of_the_slowest_speed_that_is_shown(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def found(*_: Any, fps: float, **__: Any) -> NoReturn:
        asked.append(fps)
        raise UserError("enough")

    for module in ("plan", "clip_plan"):
        monkeypatch.setattr(f"pipelines.data.{module}.find_videos", found)
    slower = AugmentationConfig(speed=(0.5, 2.0))
    recipe = replace(tiny_recipe, data=replace(tiny_recipe.data, augmentation=slower))
    with pytest.raises(UserError, match="enough"):
        make_plan(recipe.data, read_annotations(recipe.data))
    recipe = replace(recipe, finetune=replace(recipe.finetune, epochs=1))
    with pytest.raises(UserError, match="enough"):
        read_lists(finetuning(recipe).data)
    assert asked == [24.0, 24.0]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_files_that_do_not_last_as_long_as_annotated_are_remarked(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    config = replace(changed(tiny_recipe.data, tmp_path, toy_001=30.0), dataset="activitynet-1.3")
    plan = make_plan(config, read_annotations(config))
    (remark,) = plan.remarks
    assert "toy_001" in remark
    assert "30 s" in remark
    assert make_plan(tiny_recipe.data, read_annotations(tiny_recipe.data)).remarks == ()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_every_validation_video_needs_its_external_scores(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    annotations = read_annotations(tiny_recipe.data)
    names = list(reversed(annotations.classes))
    videos = [video.video_id for video in annotations.subset("validation").videos]
    path = tmp_path / "scores.json"
    config = replace(tiny_recipe.data, video_scores=str(path))
    results = {f"v_{video}": [0.1 * i for i in range(len(names))] for video in videos}
    path.write_text(json.dumps({"class": names, "results": results}))
    scores = make_plan(config, annotations).video_scores
    assert scores is not None
    assert scores.classes == annotations.classes
    found = scores.get(videos[0])
    assert found is not None
    assert int(found.argmax()) == 0  # the file has the classes in another order
    with pytest.raises(UserError, match=f"1 to {len(names)} classes, not 9"):
        make_plan(replace(config, video_scores_top=9), annotations)
    del results[f"v_{videos[0]}"]
    path.write_text(json.dumps({"class": names, "results": results}))
    with pytest.raises(UserError, match=videos[0]):
        make_plan(config, annotations)
    path.write_text(json.dumps({"class": names[1:], "results": results}))
    with pytest.raises(FileError, match="is missing"):
        make_plan(config, annotations)
