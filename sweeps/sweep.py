"""Definition of a sweep (in its file), and its configuration (on the command line)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal

import tyro
from torch import nn

from pipelines.config.recipe import Recipe
from pipelines.core.metric_names import MAP, MEMORY
from re2tal.weights import without_weights
from sweeps.constraints import Constraint
from sweeps.suggestions import Space


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Metric of a finished trial's best epoch, and the direction of better values.

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
        space: searched fields of a recipe, and their ranges.
        objectives: metrics to improve; with several, the result is a Pareto front of trials.
        epochs: default length of a trial, from the base recipe.
        trials: default number of trials.
        prepare: change of the base recipe before the search.
        postprocessing: search suppression and voting, without training, on the detections of the
            best trial; all trials then keep their raw detections.
    """

    name: str
    space: Space
    objectives: tuple[Objective, ...] = (HIGHEST_MAP,)
    epochs: Callable[[Recipe], int]
    trials: int = 12
    prepare: Callable[[Recipe], Recipe]
    postprocessing: bool = False


def one_worker(recipe: Recipe) -> Recipe:
    """Give a trial without GPUs one worker, so that two trials fit two cores."""
    if recipe.scale.gpu:
        return recipe
    return replace(recipe, scale=replace(recipe.scale, workers=1, cpus_per_decoder=0.4))


def first_layers(recipe: Recipe, share: float) -> tuple[str, ...]:
    """Name the modules with the first `share` of a backbone's blocks, for `model.frozen`.

    A share of 0 means the modules before the first block.
    """
    return _first_layers(recipe.model.backbone, share)  # type: ignore[arg-type]


@cache
def _first_layers(config: Any, share: float) -> tuple[str, ...]:
    backbone = without_weights(config.build)
    layers = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    if not layers:  # precomputed features instead of a backbone
        return ()
    last = round(share * max(layers.values()))
    return tuple(f"backbone.{name}" for name in _within(backbone, "", layers, last))


def _within(module: nn.Module, prefix: str, layers: dict[str, int], last: int) -> Iterator[str]:
    """Yield the largest modules whose parameters all lie in layers up to `last`."""
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
        trials: number of trials, including the base recipe.
        concurrency: trials at a time; None for as many as the cluster holds.
        epochs: length of a trial in epochs; the winner is trained as long as the base recipe says.
        pruning: rule that stops trials that do worse than others: asynchronous successive halving,
            the median of the others, or none. A search for several objectives stops no trial.
        sampler: source of proposals: tree-structured Parzen estimator; Gaussian processes; CMA-ES,
            for a single objective without constraints; OptunaHub's automatic choice; or random
            search, for comparison.
        constraint: bound on the best trial, such as "memory <= 20GiB", on one of the measures mAP,
            memory (of the GPU), host_memory, frames_per_second and time; may be given several
            times.
        warm_start: earlier sweep whose trials the sampler learns from at the start: the id of its
            run, its folder, its optuna.db, or the URL of its storage.
        seed: seed of the sampler.
        minutes: time budget, after which running trials are stopped; None for no budget.
        storage: URL of a database for Optuna's trials, such as a schema of MLflow's PostgreSQL
            server, which survives a restart of the head node; None for a file in the output.
        resume: continue the last sweep of the same configuration if it did not finish, or had fewer
            trials.
        base: base recipe of the search; its experiment and output are replaced by the sweep's.
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
        if self.base.scale.validation_workers:
            raise ValueError(
                "--base.scale.validation-workers must be 0: trials are compared by the mAP of each "
                "epoch, which has to be there when the epoch ends."
            )
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes must be above 0, not {self.minutes:g}.")
        _ = self.constraints

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Parsed constraints on the best trial."""
        return tuple(map(Constraint.of, self.constraint))

    @property
    def trial_recipe(self) -> Recipe:
        """Recipe of the trial that trains the base recipe, evaluated from the same share on."""
        first = round(self.base.evaluate_from * self.epochs / self.base.epochs)
        return replace(
            self.base,
            experiment=self.experiment,
            output=self.output,
            epochs=self.epochs,
            evaluate_from=min(max(1, first), self.epochs),
        )
