"""Definition of a sweep by its file, and its configuration by the command line."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn

from pipelines.config.recipe import Recipe
from pipelines.core.metric_names import MAP, MEMORY
from sweeps.constraints import Constraint
from sweeps.suggestions import Space


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Metric of a finished trial, by its best epoch, and the direction in which it gets better.

    Attributes:
        metric: name of the metric in MLflow.
        mode: direction of better values.
        title: name of the metric in tables and pictures.
    """

    metric: str
    mode: Literal["max", "min"]
    title: str


HIGHEST_MAP = Objective(metric=MAP, mode="max", title="average mAP")
LOWEST_MEMORY = Objective(metric=MEMORY, mode="min", title="peak memory, MB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Search that one file of this folder defines.

    Attributes:
        name: file name of the script, without its ending.
        space: fields of a recipe that are searched, and their ranges.
        objectives: metrics to improve; with several, a front of trials is the result.
        epochs: default length of a trial, from the base recipe.
        trials: default number of trials.
        prepare: change of the base recipe before the search.
        postprocessing: search suppression and voting, without training, over the detections of the
            best trial; the trials then keep their raw detections.
    """

    name: str
    space: Space
    objectives: tuple[Objective, ...] = (HIGHEST_MAP,)
    epochs: Callable[[Recipe], int]
    trials: int = 12
    prepare: Callable[[Recipe], Recipe]
    postprocessing: bool = False


def one_worker(recipe: Recipe) -> Recipe:
    """Give a trial one worker where there are no GPUs, so that two trials fit two cores."""
    if recipe.scale.gpu:
        return recipe
    return replace(recipe, scale=replace(recipe.scale, workers=1, cpus_per_decoder=0.4))


def first_layers(recipe: Recipe, share: float) -> tuple[str, ...]:
    """Name the modules that hold the first share of a backbone's blocks, for `model.frozen`.

    A share of 0 stands for all that comes before the first block.
    """
    return _first_layers(recipe.model.backbone, share)  # type: ignore[arg-type]


@cache
def _first_layers(config: Any, share: float) -> tuple[str, ...]:
    with torch.device("meta"):  # only the names are of interest
        backbone = config.build()
    layers = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    if not layers:  # precomputed features in its place
        return ()
    last = round(share * max(layers.values()))
    return tuple(f"backbone.{name}" for name in _within(backbone, "", layers, last))


def _within(module: nn.Module, prefix: str, layers: dict[str, int], last: int) -> Iterator[str]:
    """Yield the largest modules all of whose parameters lie in the first layers."""
    for name, child in module.named_children():
        whole = f"{prefix}{name}"
        own = [layer for parameter, layer in layers.items() if parameter.startswith(f"{whole}.")]
        if own and max(own) <= last:
            yield whole
        elif own and min(own) <= last:
            yield from _within(child, f"{whole}.", layers, last)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Configuration of a sweep.

    Attributes:
        name: names of the sweep and of its base recipe.
        experiment: MLflow experiment.
        output: folder of checkpoints and of the default MLflow store.
        trials: number of trials, the base recipe's own among them.
        concurrency: trials at a time; None for as many as the cluster holds.
        epochs: length of a trial. The base recipe's own is for the winner.
        pruning: rule that stops trials that do worse than others: asynchronous successive halving,
            the median of the others, or none. A search for several objectives stops none.
        sampler: source of proposals: the tree-structured Parzen estimator; Gaussian processes;
            CMA-ES, for a single objective without constraints; OptunaHub's choice by the space; or
            chance, to compare.
        constraint: bound that the best trial keeps, such as "memory <= 20GiB", where a trial's
            measures are mAP, memory (of the GPU), host_memory, frames_per_second and time; may be
            given several times.
        warm_start: earlier sweep whose trials the sampler knows from the start: the id of its run,
            its folder, its optuna.db, or the URL of its storage.
        seed: seed of the sampler.
        minutes: time after which no trial goes on; None for no such budget.
        storage: URL of a database for Optuna's trials, such as a schema of MLflow's PostgreSQL
            server, which a restarted head node still finds; None for a file in the output.
        resume: go on with the last sweep of the same configuration if it did not end, or had fewer
            trials to do.
        base: recipe that is searched around; its experiment and output are the sweep's.
    """

    name: str
    experiment: str = "re2tal-sweeps"
    output: str = "runs"
    trials: int = 12
    concurrency: int | None = None
    epochs: int
    pruning: Literal["asha", "median", "none"] = "asha"
    sampler: Literal["tpe", "gp", "cmaes", "auto", "random"] = "tpe"
    constraint: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    warm_start: str | None = None
    seed: int = 0
    minutes: float | None = None
    storage: str | None = None
    resume: bool = True
    base: Recipe

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("epochs", 1), ("concurrency", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, not {value}.")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes must be above 0, not {self.minutes:g}.")
        _ = self.constraints

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Constraints of the best trial."""
        return tuple(map(Constraint.of, self.constraint))

    @property
    def trial_recipe(self) -> Recipe:
        """Recipe of a trial that changes nothing: evaluated from the same share of epochs on."""
        first = round(self.base.evaluate_from * self.epochs / self.base.epochs)
        return replace(
            self.base,
            experiment=self.experiment,
            output=self.output,
            epochs=self.epochs,
            evaluate_from=min(max(1, first), self.epochs),
        )
