"""Paths of a run: each is resolved and checked here, once, and not again below.

Processes of a run work in other folders, so every path becomes absolute.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pipelines.config.annotations import PROBE
from pipelines.config.clip_recipes import ClassificationRecipe
from pipelines.config.recipe import Recipe
from pipelines.core.models import require_weights
from pipelines.core.storage import absolute, is_folder, require
from pipelines.data.toy import toy_clips, toy_videos
from re2tal.datasets.toy import UNFINISHED

_WHAT = {
    "annotations": "The annotations",
    "classes": "The names of the classes",
    "detections": "The detections",
    "durations": "The durations",
    "exclude": "The ids to exclude",
    "features": "The features",
    "output": "The output",
    "runs": "The runs",
    "training": "The training videos",
    "validation": "The validation videos",
    "video_scores": "The video scores",
    "videos": "The videos",
}

_OF_ANNOTATIONS = ("exclude", "durations", "video_scores")

ConfigT = TypeVar("ConfigT")


def resolved(
    config: ConfigT,
    *,
    needed: Sequence[str] = (),
    optional: Sequence[str] = (),
    written: Sequence[str] = (),
    prefix: str = "--",
) -> ConfigT:
    """Resolve and check the paths in a configuration.

    Args:
        config: a dataclass.
        needed: names of its fields with paths or URIs that must exist.
        optional: names of fields that may be None. Files that belong to annotations are optional
            without being named here.
        written: names of fields whose paths need not exist yet.
        prefix: prefix of the fields' command-line options, for messages.

    Raises:
        UserError: if a path was not given, does not exist or cannot be reached.
    """
    fields: Any = config
    found: dict[str, str | tuple[str, ...]] = {}
    optional = (*optional, *(name for name in _OF_ANNOTATIONS if hasattr(config, name)))
    for name in (*needed, *optional, *written):
        uri, option = getattr(fields, name), f"{prefix}{name.replace('_', '-')}"
        if name in optional and (uri is None or (name, uri) == ("durations", PROBE)):
            continue
        if name in written and uri is not None:
            found[name] = absolute(uri)
        elif isinstance(uri, tuple):
            found[name] = tuple(require(one, what=_WHAT[name], option=option) for one in uri)
        else:
            found[name] = require(uri, what=_WHAT[name], option=option)
    whole: ConfigT = replace(fields, **found)
    return whole


def detection_inputs(recipe: Recipe) -> Recipe:
    """Resolve and check the paths of a recipe for a detector; make the toy data if missing.

    Raises:
        UserError: if an input was not given, does not exist or cannot be reached.
    """
    data, model = recipe.data, recipe.model
    if data.make_toy and data.annotations and not Path(data.annotations).exists():
        folder = Path(data.annotations).absolute().parent
        print(f"making the toy data set in {folder}", flush=True)
        toy_videos(folder)
    model = replace(
        model,
        weights=require_weights(model.weights),
        localizer_weights=require_weights(
            model.localizer_weights,
            option="--model.localizer-weights",
            what="The localizer's weights",
        ),
    )
    seen = "videos" if data.features is None else "features"
    data = resolved(data, needed=("annotations", seen), prefix="--data.")
    return resolved(replace(recipe, data=data, model=model), written=("output",))


def classification_inputs(recipe: ClassificationRecipe) -> ClassificationRecipe:
    """Resolve and check the paths of a recipe for a classifier; make the toy clips if missing.

    Raises:
        UserError: see `detection_inputs`.
    """
    data, model = recipe.data, recipe.model
    annotated = data.annotations is not None
    if data.make_toy and not annotated and data.training and "://" not in data.training:
        training = Path(data.training).absolute()
        if not training.exists() or (training.parent / UNFINISHED).exists():
            print(f"making the toy data set's trimmed split in {training.parent}", flush=True)
            toy_clips(training.parent)
    model = replace(model, weights=require_weights(model.weights))
    if annotated:
        data = replace(data, training=None, validation=None, classes=None)
        data = resolved(data, needed=("annotations", "videos"), prefix="--data.")
    else:
        needed = ("training", "validation")
        data = resolved(data, needed=needed, optional=("classes",), prefix="--data.")
        lists = [uri for uri in (data.training, data.validation) if not is_folder(str(uri))]
        place: tuple[str, ...] = ("videos",)
        data = resolved(
            data, needed=place if lists else (), optional=() if lists else place, prefix="--data."
        )
    return resolved(
        replace(recipe, data=data, model=model),
        written=("output", "weights_file") if recipe.weights_file else ("output",),
    )
