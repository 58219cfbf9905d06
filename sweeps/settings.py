"""How a sweep is run, whatever it searches."""

from dataclasses import dataclass, replace
from typing import Literal

from pipelines.config.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """The configuration of a sweep.

    Attributes:
        name: of the sweep and its base recipe.
        experiment: MLflow experiment.
        output: folder of checkpoints and of the default MLflow store.
        trials: that are started, the base recipe's own among them.
        concurrency: trials at a time; None as many as the cluster holds.
        epochs: of a trial. The base recipe's own are for the winner.
        pruning: what stops trials that do worse than others: asynchronous successive halving,
            the median of the others, or nothing. A search for several objectives stops none.
        sampler: what proposes: the tree-structured Parzen estimator, or chance, to compare with.
        seed: of the sampler.
        minutes: after which no trial goes on; None for no such budget.
        storage: URL of a data base for what Optuna learns, such as a schema of MLflow's PostgreSQL
            server, which a head that is started anew still finds; None is a file in the output.
        resume: go on with the last sweep of the same configuration if it did not end, or was asked
            for fewer trials.
        base: the recipe that is searched around; its experiment and output are the sweep's.
    """

    name: str
    experiment: str = "re2tal-sweeps"
    output: str = "runs"
    trials: int = 12
    concurrency: int | None = None
    epochs: int
    pruning: Literal["asha", "median", "none"] = "asha"
    sampler: Literal["tpe", "random"] = "tpe"
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

    @property
    def trial_recipe(self) -> Recipe:
        """What a trial trains unless it is told otherwise."""
        return replace(
            self.base, experiment=self.experiment, output=self.output, epochs=self.epochs
        )
