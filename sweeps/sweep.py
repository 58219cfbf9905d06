"""What one file of this folder defines: where to search, and what for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipelines.config.recipe import Recipe
from pipelines.core.metric_names import MAP
from sweeps.epoch_reports import MEMORY
from sweeps.suggestions import Space


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """A metric of a finished trial, and which way it is better.

    Attributes:
        metric: its name in MLflow.
        mode: larger or smaller.
        title: in tables and pictures.
    """

    metric: str
    mode: Literal["max", "min"]
    title: str


HIGHEST_MAP = Objective(metric=MAP, mode="max", title="average mAP")
LOWEST_MEMORY = Objective(metric=MEMORY, mode="min", title="peak memory, MB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A search.

    Attributes:
        name: of the script, without its ending.
        space: which fields of a recipe are searched, and where.
        objectives: what is wanted; with several, a front of trials is the result.
        epochs: of a trial, by default: a function of the base recipe.
        trials: by default.
        prepare: what is changed in the base recipe before the search.
        postprocessing: whether suppression and voting are searched, without training, over what the
            best trial detected; the trials then keep their raw detections.
    """

    name: str
    space: Space
    objectives: tuple[Objective, ...] = (HIGHEST_MAP,)
    epochs: Callable[[Recipe], int]
    trials: int = 12
    prepare: Callable[[Recipe], Recipe]
    postprocessing: bool = False
