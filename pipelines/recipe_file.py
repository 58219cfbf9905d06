"""The complete configuration of a run as a file: what `train.py --from-run` trains again."""

import json
import tempfile
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipelines.mlflow_artifacts import fetch
from pipelines.recipe import Recipe
from pipelines.storage import StorageError
from pipelines.tracking import Run

FILE = "recipe.json"
_RECIPE = TypeAdapter(Recipe)


def log_recipe(run: Run, recipe: Recipe) -> None:
    """Writes a run's configuration to its artifacts.

    Args:
        run: the run.
        recipe: its configuration.
    """
    run.client.log_text(run.run_id, _RECIPE.dump_json(recipe, indent=2).decode(), FILE)


def recipe_of(run: Run) -> Recipe:
    """Reads the configuration of a run of `train.py`, or of a trial of a sweep.

    Args:
        run: in a store that exists.

    Raises:
        StorageError: if there is no such run, it was another script's, or its configuration has
            fields that this version does not have.
    """
    with tempfile.TemporaryDirectory() as folder:
        uri = f"runs:/{run.run_id}/{FILE}"
        path = fetch(uri, Path(folder), tracking_uri=run.uri, what="The run's configuration")
        content = path.read_bytes()
    try:
        recipe = _RECIPE.validate_json(content)
    except ValidationError as error:
        raise StorageError(f"{uri} is not a recipe of this version of re2tal: {error}") from error
    unknown = _names(json.loads(content)) - _names(json.loads(_RECIPE.dump_json(recipe)))
    if unknown:
        raise StorageError(
            f"{uri} is not a recipe of this version of re2tal, which has no "
            f"{', '.join(sorted(unknown))}: train with the version that made it."
        )
    return recipe


def _names(value: Any, prefix: str = "") -> set[str]:
    """The dotted names of all fields in nested objects."""
    if not isinstance(value, dict):
        return {prefix}
    return {
        name
        for key, inner in value.items()
        for name in _names(inner, f"{prefix}.{key}" if prefix else key)
    }
