"""Accuracy of full finetuning against that of adapters, of LoRA and of a frozen backbone.

A recipe of `train.py` is trained end to end in each way with the same seeds, windows, order,
initial weights and number of epochs. Learning rates of the backbone's trained part are chosen on
another seed, which is not among those compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.config.recipes import RECIPES
from pipelines.data.toy import toy_videos
from pipelines.experiments.experiment import (
    Finding,
    Job,
    Measured,
    Result,
    Row,
    Section,
    finding,
    refuse_unknown,
)
from pipelines.experiments.tal import configured, localize

# Options of `train.py` for the learning rate of the backbone's trained part.
_RATES = {
    "full": "--optim.backbone-lr",
    "adapters": "--optim.adapter-lr",
    "lora": "--optim.adapter-lr",
    "frozen": None,
}
_LEARNING = [tuning for tuning, option in _RATES.items() if option]
_MARGIN = 0.02  # loss of average mAP that still counts as being as accurate


@dataclass(frozen=True, kw_only=True, slots=True)
class Tunings:
    """Average mAP of full finetuning, adapters, LoRA and a frozen backbone.

    Attributes:
        recipe: toy recipe of `train.py`, which is trained in one process.
        seeds: seeds of windows, order and random weights.
        full_lr: learning rate of the whole backbone; the default is the best of `tried`.
        adapters_lr: learning rate of adapters, likewise.
        lora_lr: learning rate of LoRA's matrices, likewise.
        tried: learning rates to try for all three.
        tried_on: seed on which they are tried.
        options: options of `train.py`.
    """

    recipe: str = "toy_videomae"
    seeds: tuple[int, ...] = (0, 1, 2)
    full_lr: float = 2e-4
    adapters_lr: float = 5e-3
    lora_lr: float = 5e-3
    tried: tuple[float, ...] = (2e-4, 1e-3, 5e-3)
    tried_on: int = 7
    options: tuple[str, ...] = ("--evaluate-from", "4")

    def __post_init__(self) -> None:
        toys = [name for name, recipe in RECIPES.items() if recipe().data.make_toy]
        refuse_unknown("toy recipe", [self.recipe], toys)

    def prepare(self) -> None:
        """Make the toy videos, unless the options name others."""
        data = configured(self.recipe, self.options).data
        if data.make_toy and data.annotations is not None:
            toy_videos(Path(data.annotations).parent)

    @property
    def _rates(self) -> dict[str, float | None]:
        own = {"full": self.full_lr, "adapters": self.adapters_lr, "lora": self.lora_lr}
        return {tuning: own.get(tuning) for tuning in _RATES}

    def jobs(self) -> Sequence[Job]:
        """List each tuning with each seed, and each learning rate to try."""
        tries = [(tuning, self.tried_on, rate) for tuning in _LEARNING for rate in self.tried]
        runs = [(tuning, seed, rate) for tuning, rate in self._rates.items() for seed in self.seeds]
        return [self._job(*one) for one in [*runs, *tries]]

    def _job(self, tuning: str, seed: int, rate: float | None) -> Job:
        options = [*self.options, "--model.tuning", tuning]
        option = _RATES[tuning]
        options += [] if option is None else [option, str(rate)]
        return Job(
            name=_name(tuning, seed, rate),
            work=localize,
            arguments={
                "recipe": self.recipe,
                "options": options,
                "way": "reversible",
                "seed": seed,
            },
        )

    def section(self, results: Mapping[str, Result]) -> Section:
        """Report each tuning's average mAP, parameters and memory."""
        found = {
            tuning: [results[_name(tuning, seed, rate)] for seed in self.seeds]
            for tuning, rate in self._rates.items()
        }
        reached = {t: Measured(tuple(r["mAP"] for r in runs)) for t, runs in found.items()}
        rows = [
            _row(tuning, rate, found[tuning], reached[tuning])
            for tuning, rate in self._rates.items()
        ]
        tries: list[Row] = [
            {"learning rate": rate}
            | {t: results[_name(t, self.tried_on, rate)]["mAP"] for t in _LEARNING}
            for rate in self.tried
        ]
        return Section(
            title="Full finetuning, adapters, LoRA and a frozen backbone on toy data",
            text=(
                f"`{self.recipe}` of `train.py` with {' '.join(self.options) or 'its settings'}, "
                f"the backbone reversible, {len(self.seeds)} seeds, in one process. The ways "
                "differ only in the trained part of the backbone and its learning rate, which is "
                f"the best of those tried on seed {self.tried_on}. Trained parameters are those "
                "of the whole detector; memory is the predicted memory of a step's activations. "
                f"As accurate means within {_MARGIN} of average mAP. Two numbers count as "
                "different if their mean difference over the seeds exceeds two standard errors."
            ),
            findings=list(_findings(reached)),
            tables={
                "Average mAP": rows,
                f"Average mAP of learning rates, seed {self.tried_on}": tries,
            },
            metrics={f"tunings/{tuning}": m.mean for tuning, m in reached.items()},
        )


def _name(tuning: str, seed: int, rate: float | None) -> str:
    return f"{tuning}, seed {seed}" + ("" if rate is None else f", learning rate {rate:g}")


def _row(tuning: str, rate: float | None, runs: Sequence[Result], reached: Measured) -> Row:
    return {
        "tuning": tuning,
        "average mAP": reached.mean,
        "deviation": reached.deviation,
        "learning rate": "" if rate is None else f"{rate:g}",
        "trained parameters, thousands": runs[0]["trained"] / 1e3,
        "activations, MB": runs[0]["activations_mb"],
        "seconds": sum(run["seconds"] for run in runs) / len(runs),
        "seeds": len(runs),
        "every seed": list(reached.values),
    }


def _findings(reached: Mapping[str, Measured]) -> list[Finding]:
    full, frozen = reached["full"], reached["frozen"]
    return [finding("Full finetuning improves over a frozen backbone", full, frozen)] + [
        one
        for tuning in ("adapters", "lora")
        for one in (
            finding(f"{tuning}: more accurate than a frozen backbone", reached[tuning], frozen),
            finding(f"{tuning}: as accurate as full", reached[tuning], full, margin=_MARGIN),
        )
    ]
