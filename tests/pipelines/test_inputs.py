"""Paths of a recipe: each is resolved and checked once, before anything starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.recipe import Recipe
from pipelines.data import inputs
from pipelines.data.inputs import detection_inputs, resolved
from pipelines.inference.options import EvaluateConfig
from re2tal.errors import UserError


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"annotations": "/nowhere/a.json"}, "nothing at /nowhere/a.json. Correct --data.annot"),
        ({"annotations": None}, "no path given. Say where with --data.annotations"),
        ({"videos": "/nowhere"}, "nothing at /nowhere. Correct --data.videos"),
        ({"exclude": "/nowhere"}, "The ids to exclude: nothing at /nowhere. Correct --data.excl"),
        ({"durations": "/nowhere"}, "The durations: nothing at /nowhere. Correct --data.durations"),
        ({"video_scores": "/nowhere"}, "nothing at /nowhere. Correct --data.video-scores"),
        ({"features": "/nowhere", "videos": None}, "nothing at /nowhere. Correct --data.features"),
    ],
)
def test_what_is_missing_is_one_sentence(
    tiny_recipe: Recipe, changes: dict[str, Any], expected: str
) -> None:
    data = replace(tiny_recipe.data, make_toy=False, **changes)
    with pytest.raises(UserError, match=expected) as caught:
        detection_inputs(replace(tiny_recipe, data=data))
    assert "\n" not in str(caught.value)


def test_every_path_becomes_absolute_and_nothing_else_changes(
    tiny_recipe: Recipe, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ids.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    data = replace(
        tiny_recipe.data,
        annotations=str(tiny_set / "annotations.json"),
        videos=f"file://{tiny_set}/videos",
        exclude="ids.txt",
        durations="probe",
    )
    given = replace(tiny_recipe, data=data, output="runs")
    found = detection_inputs(given)
    assert found == replace(
        given,
        data=replace(data, exclude=str(tmp_path / "ids.txt")),
        output=str(tmp_path / "runs"),
    )
    assert detection_inputs(found) == found


def test_toy_data_are_made_only_if_they_are_missing(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "videos").mkdir(parents=True)
        (folder / "annotations.json").write_text("{}")

    monkeypatch.setattr(inputs, "toy_videos", make)
    data = replace(
        tiny_recipe.data,
        annotations=str(tmp_path / "toy" / "annotations.json"),
        videos=str(tmp_path / "toy" / "videos"),
        make_toy=True,
    )
    recipe = replace(tiny_recipe, data=data)
    for _ in range(2):
        assert detection_inputs(recipe).data == data
    assert made == [tmp_path / "toy"]


def test_places_of_a_script_are_named_by_its_own_options(tmp_path: Path) -> None:
    config = EvaluateConfig(detections=(str(tmp_path / "no.json"),), output="out")
    with pytest.raises(UserError, match=r"nothing at .*no.json. Correct --detections"):
        resolved(config, needed=("detections",))
    assert resolved(config, optional=("annotations",)) == config
    with pytest.raises(UserError, match=r"The videos: no path given. Say where with --videos"):
        resolved(config, needed=("videos",))
    (tmp_path / "no.json").touch()
    found = resolved(config, needed=("detections",), written=("output",))
    assert found == replace(config, output=str(Path("out").absolute()))
