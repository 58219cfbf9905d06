"""The paper's third claim: end-to-end training improves over training on features.

The same detector, with the same seeds, windows and order, is trained on the features of a frozen
plain backbone, end to end plain, and end to end reversible. As in the paper, reversible training
starts from a backbone that was rewired and then finetuned on trimmed clips (step 4). A fourth
training uses the saved memory for larger frames, within the memory of plain training.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Literal

import tyro
from matplotlib.figure import Figure

from pipelines.config.recipe import Recipe
from pipelines.config.recipes import RECIPES
from pipelines.data.plan import make_plan, read_annotations
from pipelines.data.toy import toy_videos
from pipelines.data.videos import probe_files_here
from pipelines.experiments.accuracy import finetune_backbone, make_clips, train_here
from pipelines.experiments.experiment import (
    Finding,
    Job,
    Measured,
    Result,
    Row,
    Section,
    Tables,
    at_least,
    finding,
    refuse_unknown,
)
from pipelines.experiments.pictures import tidy
from pipelines.training.activations import activation_metrics
from pipelines.training.detection import DetectionTask
from pipelines.training.model import build_detector
from re2tal.datasets.toy import ANNOTATIONS, VIDEOS, ToyConfig, TrimmedToyConfig

Training = Literal["features", "plain", "reversible"]
TRAININGS: dict[Training, str] = {
    "features": "features of a frozen backbone",
    "plain": "end to end, plain",
    "reversible": "end to end, reversible",
}

_MEMORY = "memory/predicted_activations_mb"
_TRAINED = "parameters/trained"
_MARGIN = 0.02  # loss of average mAP that still counts as preserved
LARGER = "end to end, reversible, larger frames"
_LOOKS = {
    TRAININGS["features"]: ("0.6", "s"),
    TRAININGS["plain"]: ("#4d4d4d", "o"),
    TRAININGS["reversible"]: ("#c2182b", "o"),
    LARGER: ("#c2182b", "^"),
}
"""Colour and marker of each training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tal:
    """Localization on features, end to end plain, and end to end reversible.

    Attributes:
        recipes: recipes of `train.py`. Toy recipes are trained in one process each, several at a
            time; others by Ray Train, one after another.
        seeds: seeds of windows, order and the weights of the localizer.
        larger: side in pixels of the larger frames that use the saved memory, for the first recipe;
            None leaves them out.
        rewired: weights of the backbone that reversible training starts from: rewired and then
            finetuned (finetune_backbone.py). By default, those of toy recipes are made on toy
            clips; other recipes start from their own weights, rewired without finetuning.
        finetuning_epochs: length of the toy backbone's finetuning.
        folder: folder of the toy videos and clips, which are made if missing.
        clips: numbers of clips for finetuning the toy backbone.
        videos: numbers of videos.
        options: options of `train.py`, for all recipes; on the command line they follow "--". By
            default frames have half the side of those that the toy backbone was pretrained on: the
            backbone still has something to learn, and larger frames are possible.
    """

    recipes: tuple[str, ...] = ("toy", "toy_vsgn")
    seeds: tuple[int, ...] = (0, 1, 2)
    larger: int | None = 48
    rewired: str | None = None
    finetuning_epochs: int = 5
    folder: str = "data/toy_tal"
    clips: TrimmedToyConfig = field(
        default_factory=lambda: TrimmedToyConfig(training=210, validation=70)
    )
    videos: ToyConfig = field(default_factory=lambda: ToyConfig(training=24))
    options: tuple[str, ...] = ("--epochs", "6", "--evaluate-from", "6", "--data.size", "32")

    def __post_init__(self) -> None:
        refuse_unknown("recipe", self.recipes, RECIPES)

    def prepare(self) -> None:
        """Make toy videos and clips, and finetune the rewired backbone, if they are needed."""
        if not any(self._on_toy(recipe) for recipe in self.recipes):
            return
        toy_videos(Path(self.folder), self.videos)
        if self.rewired is None:
            folder = Path(self.folder) / "clips"
            make_clips(folder, self.clips)
            finetune_backbone(
                self._rewired_toy, epochs=self.finetuning_epochs, folder=folder, clips=self.clips
            )

    @property
    def _rewired_toy(self) -> Path:
        return Path(self.folder) / "rewired.safetensors"

    def _on_toy(self, recipe: str) -> bool:
        return RECIPES[recipe]().data.make_toy and "--data.annotations" not in self.options

    def _options(self, recipe: str, title: str) -> list[str]:
        """Return the options of `train.py` for a training, the same for all seeds."""
        on_toy, options = self._on_toy(recipe), []
        if on_toy:
            options += ["--data.annotations", f"{self.folder}/{ANNOTATIONS}"]
            options += ["--data.videos", f"{self.folder}/{VIDEOS}"]
        options += self.options
        rewired = self.rewired or (str(self._rewired_toy) if on_toy else None)
        if title in (TRAININGS["reversible"], LARGER) and rewired is not None:
            options += ["--model.weights", rewired]
        if title == LARGER:
            options += ["--data.size", str(self.larger)]
        return options

    def _trainings(self, recipe: str) -> dict[str, Training]:
        """Return the way of each training of a recipe, by title."""
        ways: dict[str, Training] = {title: way for way, title in TRAININGS.items()}
        spent = self.larger is not None and recipe == self.recipes[0]
        return ways | ({LARGER: "reversible"} if spent else {})

    def jobs(self) -> Sequence[Job]:
        """List one job for each recipe, seed and way."""
        found = []
        for recipe, seed in product(self.recipes, self.seeds):
            for title, way in self._trainings(recipe).items():
                options = self._options(recipe, title)
                spreads = not configured(recipe, options).data.make_toy
                found.append(
                    Job(
                        name=_name(recipe, title, seed),
                        work=localize,
                        arguments={"recipe": recipe, "options": options, "way": way, "seed": seed},
                        alone=spreads,
                        spreads=spreads,
                    )
                )
        return found

    @property
    def _begins(self) -> str:
        """Describe the initial weights of reversible training, for the report."""
        if self.rewired is not None:
            return f"Reversible training starts from the weights in {self.rewired}."
        if all(self._on_toy(recipe) for recipe in self.recipes):
            return (
                "Reversible training starts from the backbone that was rewired and finetuned for "
                f"{self.finetuning_epochs} epochs of {self.clips.training} trimmed clips."
            )
        return "Without --tal.rewired, reversible training starts from the plain network's weights."

    def section(self, results: Mapping[str, Result]) -> Section:
        """Report on localization."""
        tables: Tables = {}
        findings: list[Finding] = []
        metrics: dict[str, float] = {}
        points: dict[str, list[tuple[str, float, Measured]]] = {}
        for recipe in self.recipes:
            found = {
                title: [results[_name(recipe, title, seed)] for seed in self.seeds]
                for title in self._trainings(recipe)
            }
            reached = {t: Measured(tuple(r["mAP"] for r in runs)) for t, runs in found.items()}
            memory = {title: runs[0]["activations_mb"] for title, runs in found.items()}
            tables[f"Average mAP: {recipe}"] = [
                _row(title, runs, reached[title]) for title, runs in found.items()
            ]
            findings += _findings(recipe, reached, memory)
            metrics |= {f"tal/{recipe}/{title}": m.mean for title, m in reached.items()}
            points[recipe] = [(title, memory[title], reached[title]) for title in found]
        return Section(
            title="End to end improves over features",
            text=(
                f"Recipes of `train.py` with {' '.join(self.options) or 'their own settings'}, "
                f"{len(self.seeds)} seeds. The ways differ only in the backbone: windows, their "
                "order and the localizer's initial weights are the same. Features are those of "
                "the frozen plain backbone on the same windows. "
                f"{self._begins} Memory is the predicted memory of the activations of a worker's "
                f"step. Preserved means within {_MARGIN} of average mAP. Two numbers count as "
                "different if their mean difference over the seeds exceeds two standard errors."
            ),
            findings=findings,
            tables=tables,
            figures={"map-against-memory": _picture(points)},
            metrics=metrics,
        )


def quick() -> Tal:
    """Configure one epoch of few videos, only to show that everything runs."""
    return Tal(
        recipes=("toy",),
        seeds=(0,),
        larger=None,
        finetuning_epochs=1,
        folder="data/toy_tal_quick",
        clips=TrimmedToyConfig(training=14, validation=7, seconds=3.0),
        videos=ToyConfig(training=3, validation=2, seconds=(14.0, 16.0)),
        options=("--epochs", "1", "--data.size", "32", "--data.window.frames", "64"),
    )


def _name(recipe: str, title: str, seed: int) -> str:
    return f"{recipe}: {title}, seed {seed}"


def _row(title: str, runs: Sequence[Result], reached: Measured) -> Row:
    of_each = {
        f"tIoU {name.removeprefix('mAP/tiou_')}": sum(run[name] for run in runs) / len(runs)
        for name in runs[0]
        if name.startswith("mAP/tiou_")
    }
    return {
        "training": title,
        "average mAP": reached.mean,
        "deviation": reached.deviation,
        **of_each,
        "activations, MB": runs[0]["activations_mb"],
        "seconds": sum(run["seconds"] for run in runs) / len(runs),
        "seeds": len(runs),
        "every seed": list(reached.values),
    }


def _findings(
    recipe: str, reached: Mapping[str, Measured], memory: Mapping[str, float]
) -> list[Finding]:
    features, plain, ours = (reached[TRAININGS[way]] for way in ("features", "plain", "reversible"))
    findings = [
        finding(f"{recipe}: end to end improves over features", ours, features),
        finding(
            f"{recipe}: reversible training is as accurate as plain training",
            ours,
            plain,
            margin=_MARGIN,
        ),
    ]
    if LARGER in reached:
        within = memory[LARGER] <= memory[TRAININGS["plain"]]
        gained = at_least(reached[LARGER], plain)
        findings.append(
            Finding(
                claim=f"{recipe}: larger frames in the memory of plain training improve over it",
                holds=gained if within else False,
                evidence=(
                    f"{reached[LARGER]} against {plain}, with {memory[LARGER]:.0f} against "
                    f"{memory[TRAININGS['plain']]:.0f} MB of activations"
                ),
            )
        )
    return findings


def _picture(points: Mapping[str, Sequence[tuple[str, float, Measured]]]) -> Figure:
    """Draw average mAP against memory, a panel for each recipe."""
    figure = Figure(figsize=(4.6 * len(points), 4.0), layout="constrained")
    panels = figure.subplots(1, len(points), squeeze=False, sharey=True)[0]
    for axes, (recipe, found) in zip(panels, points.items(), strict=True):
        for title, memory, reached in found:
            colour, marker = _LOOKS[title]
            axes.errorbar(
                memory,
                reached.mean,
                yerr=reached.deviation,
                fmt=marker,
                color=colour,
                markersize=8,
                capsize=3,
                label=title,
            )
        most = max(memory for _, memory, _ in found)
        localizer = type(RECIPES[recipe]().model.localizer).__name__.removesuffix("Config")
        axes.set(title=f"{localizer} ({recipe})", xlim=(0, 1.1 * most))
        axes.set_xlabel("activations of a worker's step, MB")
        tidy(axes)
    panels[0].set_ylabel("average mAP")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


# Jobs.


def configured(recipe: str, options: Sequence[str]) -> Recipe:
    """Read a recipe with options of `train.py`; an unknown option ends the program."""
    default = RECIPES[recipe]()
    return tyro.cli(Recipe, default=default, args=options, prog=f"reproduce.py ... -- [{recipe}]")


def localize(*, recipe: str, options: Sequence[str], way: Training, seed: int) -> Result:
    """Train a recipe's detector in one way, and evaluate it.

    A toy recipe is trained in this process; any other by Ray Train in a separate run, as `train.py`
    does. The seed is that of windows, their order and random weights.

    Returns:
        Average mAP, mAP at every threshold, predicted memory of a worker's step in MB, trained
        parameters, seconds; and the id of an MLflow run, if there is one.
    """
    asked = trained_in(configured(recipe, options), way, seed)
    return _here(asked) if asked.data.make_toy else _on_the_cluster(asked)


def trained_in(recipe: Recipe, way: Training, seed: int) -> Recipe:
    """Change a recipe to one way of training.

    Only the backbone differs: the windows, their order and the localizer's initial weights are the
    same. Features of a frozen backbone are computed on the fly, for the same windows.
    """
    model = replace(recipe.model, reversible=way == "reversible")
    if way == "features":
        model = replace(model, tuning="frozen", frozen=(), norms="trained")
    return replace(recipe, seed=seed, model=model)


def _here(recipe: Recipe) -> Result:
    annotations = read_annotations(recipe.data)
    plan = make_plan(recipe.data, annotations, probe=probe_files_here)
    detector = build_detector(recipe, plan.classes, recipe.model.weights)
    trained = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    counted = activation_metrics(recipe, detector) | {_TRAINED: trained}
    began = time.perf_counter()
    metrics, _ = train_here(DetectionTask(recipe=recipe, plan=plan), recipe.model.weights)
    return _reached(metrics | counted, time.perf_counter() - began)


def _on_the_cluster(recipe: Recipe) -> Result:
    from pipelines.training.run import train  # here: toy experiments run without Ray

    run = train(recipe)
    found = run.client.get_run(run.run_id)
    seconds = ((found.info.end_time or 0) - found.info.start_time) / 1000
    return _reached(found.data.metrics, seconds) | {"run_id": run.run_id}


def _reached(metrics: Mapping[str, float], seconds: float) -> dict[str, float]:
    maps = {n.removeprefix("val/"): v for n, v in metrics.items() if n.startswith("val/mAP")}
    return maps | {
        "activations_mb": metrics[_MEMORY],
        "trained": metrics[_TRAINED],
        "seconds": seconds,
    }
