"""Trained detectors and weights that a command line names: paths, URIs, models or runs of MLflow.

Only `spec.json` and `weights.safetensors` of a detector are read: nothing is unpickled, and no
code that came with a model is run.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs

from pipelines.config.clip_recipes import AnyRecipe
from pipelines.core.storage import MLFLOW, fetch, local_copy, require, resolve
from re2tal.backbones.precomputed import TRAINED_ON_FEATURES, PrecomputedConfig
from re2tal.backbones.weights import NAMED
from re2tal.errors import UserError
from re2tal.inference import detector_folder
from re2tal.trained import SPEC_FILE, WEIGHTS_FILE, read_spec

_RUN_ID = re.compile(r"[0-9a-f]{32}")
MODEL_TAG = "model.uri"
"""Tag of a training run that names its model."""


def local_detector(model: str | None, scratch: Path, *, tracking: str, option: str) -> Path:
    """Find a saved detector, and fetch it if it is not on this machine.

    Args:
        model: path or URI of the folder of a saved detector, or of a training run's checkpoint;
            `runs:/RUN/NAME`, `models:/NAME/VERSION` or the id of a training run, in MLflow.
        scratch: existing folder that receives a copy.
        tracking: tracking URI of the MLflow store.
        option: the command-line option that sets the model.

    Returns:
        The folder with `spec.json` and `weights.safetensors`.

    Raises:
        UserError: there is no detector, or it was trained on features and cannot take videos.
    """
    if model is not None and not Path(model).exists():
        if _RUN_ID.fullmatch(model):
            model = _model_of_run(model, tracking, option)
        if model.startswith(MLFLOW):
            fetched = fetch(model, scratch, tracking_uri=tracking, what=f"The model ({option})")
            return _detector_in(fetched, model, option)
    uri = require(model, what="The model", option=option)
    return _detector_in(_local(uri, scratch), uri, option)


def fingerprint(folder: Path) -> str:
    """Hash specification and weights of a saved detector, which `local_detector` found."""
    digest = hashlib.sha256()
    for name in (SPEC_FILE, WEIGHTS_FILE):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _model_of_run(run_id: str, tracking: str, option: str) -> str:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        tags = MlflowClient(tracking).get_run(run_id).data.tags
    except MlflowException as error:
        raise UserError(
            f"The model: neither a file nor a run of {tracking} is named {run_id}. Correct "
            f"{option} or the MLflow store."
        ) from error
    if MODEL_TAG not in tags:
        raise UserError(
            f"The model: the run {run_id} of {tracking} has none; a training run logs its model "
            f"when it ends. Correct {option}."
        )
    return tags[MODEL_TAG]


def _local(uri: str, scratch: Path) -> Path:
    if "://" not in uri:
        return Path(uri)
    filesystem, path = resolve(uri)
    pafs.copy_files(path, str(scratch), source_filesystem=filesystem)
    return scratch


def _detector_in(folder: Path, name: str, option: str) -> Path:
    # an MLflow model keeps the files that were logged with it in `artifacts`
    inside = folder / "artifacts"
    try:
        found = detector_folder(inside if inside.is_dir() else folder)
        spec = read_spec(found)
    except UserError as error:
        raise UserError(f"The model: {name}: {error}\nCorrect {option}.") from error
    if isinstance(spec.backbone, PrecomputedConfig):
        raise UserError(f"The model: {name}: {TRAINED_ON_FEATURES}")
    return found


def require_weights(
    weights: str | None,
    *,
    option: str = "--model.weights",
    what: str = "The backbone's weights",
) -> str | None:
    """Check that there are weights at a path or URI.

    Args:
        weights: path or URI; URI of an artifact or a model in MLflow; or a name of torchvision or
            the Hugging Face Hub, such as `torchvision:swin3d_t/KINETICS400_V1` and
            `hf:MCG-NJU/videomae-base`. None for random initialization.
        option: the command-line option that sets the weights.
        what: name of the weights in the error's message.

    Returns:
        `weights`, with a path made absolute.

    Raises:
        UserError: nothing exists at the path or URI.
    """
    if weights is None or weights.startswith(NAMED):
        return weights
    return require(weights, what=what, option=option)


def fetch_weights(
    weights: str | None, folder: Path, *, tracking_uri: str | None = None
) -> str | None:
    """Copy weights to this machine.

    Args:
        weights: result of `require_weights`.
        folder: existing folder that receives a copy.
        tracking_uri: MLflow's store.

    Returns:
        Path of the weights, or the name of published weights; None for random initialization.

    Raises:
        UserError: MLflow has no such weights.
    """
    if weights is None or weights.startswith(NAMED):
        return weights
    return str(local_copy(weights, folder, tracking_uri=tracking_uri))


RecipeT = TypeVar("RecipeT", bound=AnyRecipe)


def with_weights_here(recipe: RecipeT, folder: Path, *, tracking_uri: str | None) -> RecipeT:
    """Copy the weights that a recipe names to this machine, and return it with their local paths.

    Args:
        recipe: recipe with absolute paths.
        folder: existing folder that receives copies.
        tracking_uri: MLflow's store.

    Raises:
        UserError: see `fetch_weights`.
    """
    model: Any = recipe.model
    for field in ("weights", "localizer_weights"):
        (folder / field).mkdir()
        given = getattr(model, field, None)  # classifiers have no localizer
        if given is not None:
            copy = fetch_weights(given, folder / field, tracking_uri=tracking_uri)
            model = replace(model, **{field: copy})
    return replace(recipe, model=model)
