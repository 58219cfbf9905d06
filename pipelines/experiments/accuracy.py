"""The paper's second claim: rewiring a pretrained network preserves its accuracy.

A backbone was pretrained plain. Rewired, it computes something else with the same weights; a few
epochs of finetuning (step 4 of Re2TAL), or moving its connections slowly (Dr2Net), bring the
accuracy back. Training the rewired network from nothing for as long does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from pipelines.experiments.classifying import (
    PLAIN,
    REWIRED,
    before_finetuning,
    finetuned,
    make_clips,
)
from pipelines.experiments.experiment import Finding, Job, Result, Section
from pipelines.experiments.statistics import Measured, at_least, finding
from re2tal.datasets.toy import TrimmedToyConfig

_MARGIN = 0.02  # of top-1: what counts as preserved


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Accuracy of a pretrained backbone before and after rewiring.

    Attributes:
        seeds: of clips, their order and the weights of whatever starts at random.
        epochs: of finetuning that are tried.
        clips: how many there are: those of an epoch, and those that top-1 is measured on.
        folder: of the clips; they are made.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: tuple[int, ...] = (1, 2, 5)
    clips: TrimmedToyConfig = field(
        default_factory=lambda: TrimmedToyConfig(training=210, validation=420)
    )
    folder: str = "data/toy_accuracy"

    @property
    def name(self) -> str:
        """On the command line and in files."""
        return "accuracy"

    @property
    def ways(self) -> dict[str, tuple[str, int]]:
        """To the name of each training what it is, and its epochs."""
        most = max(self.epochs)
        of = {_named(kind, most): (kind, most) for kind in ("moving", "scratch", "plain")}
        return {_named("rewired", n): ("rewired", n) for n in self.epochs} | of

    def prepare(self) -> None:
        """Makes the clips and what reads the classes off them, if they are not there."""
        make_clips(Path(self.folder), self.clips)

    def jobs(self) -> Sequence[Job]:
        """The network as it is, and each training with each seed."""
        data = {"folder": self.folder}
        before = Job(name="before finetuning", work=before_finetuning, arguments=data)
        return [before] + [
            Job(
                name=f"{name}, seed {seed}",
                work=finetuned,
                arguments=data | {"kind": kind, "epochs": epochs, "seed": seed},
            )
            for seed in self.seeds
            for name, (kind, epochs) in self.ways.items()
        ]

    def section(self, results: Mapping[str, Result]) -> Section:
        """What the report says."""
        before = results["before finetuning"]
        constant = len(self.seeds)
        reached = {name: Measured(values=(before[name],) * constant) for name in (PLAIN, REWIRED)}
        for name in self.ways:
            values = tuple(results[f"{name}, seed {seed}"]["top1"] for seed in self.seeds)
            reached[name] = Measured(values=values)
        rows = [
            {
                "network": name,
                "top-1": found.mean,
                "deviation": found.deviation,
                "seeds": 1 if name in (PLAIN, REWIRED) else constant,
                "every seed": list(found.values),
            }
            for name, found in reached.items()
        ]
        return Section(
            title="Accuracy is preserved",
            text=(
                "Classification of held-out toy clips of 7 classes (chance: 0.143) by the backbone "
                "that the repository ships, pretrained plain. An epoch of finetuning shows "
                f"{self.clips.training} of its training clips, 32 frames of each. The classes are "
                "read off by a linear layer that was fitted to the features of the plain network, "
                "and is finetuned with the rest. Preserved means: within "
                f"{_MARGIN} of the plain network's top-1; two numbers are told apart if their mean "
                "difference is two of its standard errors over the seeds."
            ),
            findings=self._findings(reached),
            tables={"Top-1 on held-out clips": rows},
            figures={"accuracy": _picture(reached)},
            metrics={f"accuracy/{name}": found.mean for name, found in reached.items()},
        )

    def _findings(self, reached: Mapping[str, Measured]) -> list[Finding]:
        most = max(self.epochs)
        plain = reached[PLAIN]
        kinds = ("rewired", "plain", "moving", "scratch")
        best, control, moved, scratch = (reached[_named(kind, most)] for kind in kinds)
        return [
            Finding(
                claim="Rewired and finetuned, the network is as accurate as the pretrained one",
                holds=at_least(best, plain, margin=_MARGIN),
                evidence=f"{best} against {plain.mean:.3f}",
            ),
            finding(
                "It is as accurate as the plain network finetuned for as long",
                best,
                control,
                margin=_MARGIN,
            ),
            finding(
                "Dr2Net's schedule does as well as finetuning after rewiring at once",
                moved,
                best,
                margin=_MARGIN,
            ),
            finding(
                "The pretrained weights are what makes it so: from scratch it is worse",
                best,
                scratch,
                margin=-_MARGIN,
            ),
        ]


def _named(kind: str, epochs: int) -> str:
    """What a training is called; its kinds are those of `finetuned`."""
    titles = {
        "rewired": "rewired, finetuned",
        "moving": "Dr2Net's schedule,",
        "scratch": "rewired, from scratch,",
        "plain": "plain, finetuned",
    }
    return f"{titles[kind]} {epochs} {'epoch' if epochs == 1 else 'epochs'}"


def quick() -> Accuracy:
    """One epoch of few clips: it shows that everything runs, and no more."""
    return Accuracy(
        seeds=(0,),
        epochs=(1,),
        clips=TrimmedToyConfig(training=14, validation=14, seconds=3.0),
        folder="data/toy_accuracy_quick",
    )


def _picture(reached: Mapping[str, Measured]) -> Figure:
    """A bar for each network, and a dot for each seed."""
    figure = Figure(figsize=(8, 0.6 + 0.4 * len(reached)), layout="constrained")
    axes = figure.subplots()
    names = list(reached)[::-1]
    for row, name in enumerate(names):
        found = reached[name]
        colour = "tab:blue" if name.startswith(("rewired", "Dr2Net")) else "0.6"
        axes.barh(row, found.mean, height=0.6, color=colour, alpha=0.6)
        axes.plot(found.values, [row] * len(found.values), "o", color="black", markersize=3)
        axes.text(1.01, row, f"{found.mean:.3f}", va="center", fontsize=9)
    axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1), xlabel="top-1")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
