"""File of a run's configuration: read as it was written, or refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.config.recipe import Recipe
from pipelines.config.recipes import RECIPES
from pipelines.core.tracking import FILE, Run, log_recipe, recipe_of, start_run
from re2tal.backbones.precomputed import PrecomputedConfig
from re2tal.errors import UserError


@pytest.fixture
def run(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return start_run(tiny_recipe, output=tmp_path)


def test_every_recipe_is_read_as_it_was_written(run: Run, tiny_recipe: Recipe) -> None:
    backbone = PrecomputedConfig(channels=8, temporal_stride=2)
    on_features = replace(
        tiny_recipe, model=replace(tiny_recipe.model, backbone=backbone, reversible=False)
    )
    for recipe in (*(make() for make in RECIPES.values()), on_features):
        log_recipe(run, recipe)
        assert recipe_of(run) == recipe


def test_what_is_no_recipe_is_refused(run: Run) -> None:
    with pytest.raises(UserError, match="The run's configuration: runs:/"):
        recipe_of(run)
    run.client.log_text(run.run_id, '{"name": "toy", "epochs": "many"}', FILE)
    with pytest.raises(UserError, match=f"{FILE} is not a recipe of this version") as error:
        recipe_of(run)
    assert "epochs: input should be a valid integer, unable to parse" in str(error.value)
    assert "data: is missing; " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_field_of_another_version_is_not_lost_in_silence(run: Run, tiny_recipe: Recipe) -> None:
    log_recipe(run, tiny_recipe)
    text = Path(run.client.download_artifacts(run.run_id, FILE)).read_text()
    run.client.log_text(run.run_id, text.replace('"clip"', '"clip_to"'), FILE)
    with pytest.raises(UserError, match=r"optim.clip_to"):
        recipe_of(run)


def test_fields_that_are_gone_and_changed_nothing_are_passed_over(
    run: Run, tiny_recipe: Recipe
) -> None:
    log_recipe(run, tiny_recipe)
    text = Path(run.client.download_artifacts(run.run_id, FILE)).read_text()
    run.client.log_text(run.run_id, text.replace('"clip":', '"compile": [], "clip":', 1), FILE)
    assert recipe_of(run) == tiny_recipe
