"""The complete configuration of a run as a file: what `train.py --from-run` trains again."""

import tempfile
from pathlib import Path

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
        try:
            return _RECIPE.validate_json(path.read_bytes())
        except ValidationError as error:
            raise StorageError(
                f"{uri} is not a recipe of this version of re2tal: {error}"
            ) from error
