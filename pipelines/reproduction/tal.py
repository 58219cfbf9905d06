"""The paper's third claim: end-to-end training improves over training on features.

The same detector with the same seeds, windows and order is trained on the features of a frozen
plain backbone, end to end plain, and end to end reversible. What the saved memory buys is tried
out too: larger frames within the memory of plain training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from pipelines.recipes import RECIPES
from pipelines.reproduction.experiment import Finding, Job, Result, Section
from pipelines.reproduction.localizing import WAYS, Way, configured, localize
from pipelines.reproduction.statistics import Measured, at_least, finding
from pipelines.toy_data import toy_videos
from re2tal.benchmarking import Row, Tables
from re2tal.videos.toy import ANNOTATIONS, VIDEOS, ToyConfig

_MARGIN = 0.02  # of average mAP: what counts as preserved
LARGER = "end to end, reversible, larger frames"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tal:
    """Localization on features, end to end plain, and end to end reversible.

    Attributes:
        recipes: of `train.py`. A toy recipe is trained in one process, several of them beside each
            other; others by Ray Train, one after the other.
        seeds: of windows, order and the weights of the localizer.
        larger: pixels of a frame's side that the saved memory is spent on, for the first recipe;
            None spends none.
        folder: of the toy videos, which are made.
        videos: how many.
        options: of `train.py`, for all recipes; on the command line they follow "--". The default's
            frames have fewer pixels than the toy recipes', to have something to spend memory on.
    """

    recipes: tuple[str, ...] = ("toy", "toy_vsgn")
    seeds: tuple[int, ...] = (0, 1, 2)
    larger: int | None = 64
    folder: str = "data/toy_tal"
    videos: ToyConfig = field(default_factory=lambda: ToyConfig(training=24))
    options: tuple[str, ...] = ("--epochs", "2", "--data.size", "48")

    def __post_init__(self) -> None:
        for recipe in self.recipes:
            if recipe not in RECIPES:
                raise ValueError(
                    f"There is no recipe {recipe!r}. Choose from: {', '.join(RECIPES)}."
                )

    @property
    def name(self) -> str:
        """On the command line and in files."""
        return "tal"

    def prepare(self) -> None:
        """Makes the toy videos, if they are needed and not there."""
        if any(self._on_toy(recipe) for recipe in self.recipes):
            toy_videos(Path(self.folder), self.videos)

    def _on_toy(self, recipe: str) -> bool:
        return RECIPES[recipe]().data.make_toy and "--data.annotations" not in self.options

    def _options(self, recipe: str) -> list[str]:
        if not self._on_toy(recipe):
            return list(self.options)
        annotations, videos = f"{self.folder}/{ANNOTATIONS}", f"{self.folder}/{VIDEOS}"
        return ["--data.annotations", annotations, "--data.videos", videos, *self.options]

    def jobs(self) -> Sequence[Job]:
        """Each recipe in each way with each seed."""
        jobs = []
        for recipe in self.recipes:
            options = self._options(recipe)
            spreads = not configured(recipe, options).data.make_toy
            jobs += [
                Job(
                    name=_name(recipe, title, seed),
                    work=localize,
                    arguments={
                        "recipe": recipe,
                        "options": options,
                        "way": way,
                        "seed": seed,
                        "size": size,
                    },
                    alone=spreads,
                    spreads=spreads,
                )
                for seed in self.seeds
                for title, way, size in self._trained(recipe)
            ]
        return jobs

    def _trained(self, recipe: str) -> list[tuple[str, Way, int | None]]:
        """Of a recipe the titles of what is trained, the way, and the size of frames."""
        trained: list[tuple[str, Way, int | None]] = [(t, way, None) for way, t in WAYS.items()]
        if self.larger is not None and recipe == self.recipes[0]:
            trained.append((LARGER, "reversible", self.larger))
        return trained

    def section(self, results: Mapping[str, Result]) -> Section:
        """What the report says."""
        tables: Tables = {}
        findings: list[Finding] = []
        metrics: dict[str, float] = {}
        points: dict[str, list[tuple[str, float, Measured]]] = {}
        for recipe in self.recipes:
            titles = [title for title, _, _ in self._trained(recipe)]
            found = {
                title: [results[_name(recipe, title, seed)] for seed in self.seeds]
                for title in titles
            }
            reached = {title: Measured(values=_maps(runs)) for title, runs in found.items()}
            memory = {title: runs[0]["activations_mb"] for title, runs in found.items()}
            tables[f"Average mAP: {recipe}"] = [
                _row(title, runs, reached[title]) for title, runs in found.items()
            ]
            findings += _findings(recipe, reached, memory)
            metrics |= {f"tal/{recipe}/{title}": m.mean for title, m in reached.items()}
            points[recipe] = [(title, memory[title], reached[title]) for title in titles]
        return Section(
            title="End to end improves over features",
            text=(
                f"Recipes of `train.py` with {' '.join(self.options) or 'their own settings'}, "
                f"{len(self.seeds)} seeds. The ways differ in nothing but the backbone: windows, "
                "their order and the localizer's first weights are the same. Features are those of "
                "the frozen plain backbone on the very same windows. Memory is predicted: the "
                "activations of a worker's step. Preserved means: within "
                f"{_MARGIN} of average mAP; two are told apart if their mean difference is two of "
                "its standard errors over the seeds."
            ),
            findings=findings,
            tables=tables,
            figures={"map-against-memory": _picture(points)},
            metrics=metrics,
        )


def quick() -> Tal:
    """One epoch of few videos: it shows that everything runs, and no more."""
    return Tal(
        recipes=("toy",),
        seeds=(0,),
        larger=None,
        folder="data/toy_tal_quick",
        videos=ToyConfig(training=3, validation=2, seconds=(14.0, 16.0)),
        options=("--epochs", "1", "--data.size", "32", "--data.window.frames", "64"),
    )


def _name(recipe: str, title: str, seed: int) -> str:
    return f"{recipe}: {title}, seed {seed}"


def _maps(runs: Sequence[Result]) -> tuple[float, ...]:
    return tuple(run["mAP"] for run in runs)


def _row(title: str, runs: Sequence[Result], reached: Measured) -> Row:
    thresholds = [name for name in runs[0] if name.startswith("mAP/tiou_")]
    of_each = {
        f"tIoU {name.removeprefix('mAP/tiou_')}": sum(run[name] for run in runs) / len(runs)
        for name in thresholds
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
    features, plain, ours = (reached[WAYS[way]] for way in ("features", "plain", "reversible"))
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
        within = memory[LARGER] <= memory[WAYS["plain"]]
        gained = at_least(reached[LARGER], plain)
        findings.append(
            Finding(
                claim=f"{recipe}: larger frames in the memory of plain training improve over it",
                holds=gained if within else False,
                evidence=(
                    f"{reached[LARGER]} against {plain}, with {memory[LARGER]:.0f} against "
                    f"{memory[WAYS['plain']]:.0f} MB of activations"
                ),
            )
        )
    return findings


def _picture(points: Mapping[str, Sequence[tuple[str, float, Measured]]]) -> Figure:
    """Average mAP against memory, a panel for each recipe."""
    figure = Figure(figsize=(5.2 * len(points), 4.2), layout="constrained")
    panels = figure.subplots(1, len(points), squeeze=False, sharey=True)[0]
    for axes, (recipe, found) in zip(panels, points.items(), strict=True):
        for title, memory, reached in found:
            colour = "tab:blue" if "reversible" in title else "0.45"
            axes.errorbar(
                memory, reached.mean, yerr=reached.deviation, fmt="o", color=colour, capsize=3
            )
            axes.annotate(
                title,
                (memory, reached.mean),
                xytext=(7, 5),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
        most = max(memory for _, memory, _ in found)
        axes.set(title=recipe, xlabel="activations of a worker's step, MB", xlim=(0, 1.6 * most))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("average mAP")
    return figure
