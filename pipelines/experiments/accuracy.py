"""The paper's second claim: rewiring a pretrained network preserves its accuracy.

A backbone was pretrained without rewiring. Rewired, it computes another function with the same
weights. A few epochs of finetuning (step 4 of Re2TAL), or moving its connections gradually
(Dr2Net), restore the accuracy. Training the rewired network from scratch for as long does not.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.config.clip_recipes import ClassificationRecipe, toy
from pipelines.core.checkout import code_fingerprint
from pipelines.data.batches import Batch, decode_batches
from pipelines.data.clip_plan import ClassificationPlan, make_plan, read_lists
from pipelines.data.toy import toy_clips
from pipelines.data.videos import probe_files_here
from pipelines.experiments.experiment import (
    Finding,
    Job,
    Measured,
    Result,
    Section,
    at_least,
    device,
    finding,
)
from pipelines.training.classification import (
    ClassificationTask,
    accuracy_metrics,
    build_classifier,
    score_videos,
)
from pipelines.training.local import LocalRuntime
from pipelines.training.trainer import Task, Trainer
from re2tal.atomic import replacing
from re2tal.backbones.weights import save_backbone_weights
from re2tal.classifier import Classifier
from re2tal.datasets.toy import TrimmedToyConfig
from re2tal.datasets.trimmed import TrimmedVideo, ViewConfig, views
from re2tal.detector import Detector

PLAIN, REWIRED = "plain, pretrained", "rewired, not finetuned"
_HEAD = "head.safetensors"
_MARGIN = 0.02  # loss of top-1 that still counts as preserved


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Accuracy of a pretrained backbone before and after rewiring.

    Attributes:
        seeds: seeds of clips, their order and randomly initialized weights.
        epochs: lengths of finetuning.
        clips: numbers of clips: of an epoch, and for measuring top-1.
        folder: folder of the clips, which are made if missing.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: tuple[int, ...] = (1, 2, 5)
    clips: TrimmedToyConfig = field(
        default_factory=lambda: TrimmedToyConfig(training=210, validation=420)
    )
    folder: str = "data/toy_accuracy"

    @property
    def ways(self) -> dict[str, tuple[str, int]]:
        """Kind and number of epochs of each training, by name."""
        most = max(self.epochs)
        of = {_named(kind, most): (kind, most) for kind in ("moving", "scratch", "plain")}
        return {_named("rewired", n): ("rewired", n) for n in self.epochs} | of

    def prepare(self) -> None:
        """Make the clips, and fit the classifier's head, if they are missing."""
        make_clips(Path(self.folder), self.clips)

    def jobs(self) -> Sequence[Job]:
        """List the evaluation of the pretrained network, and each training with each seed."""
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
        """Report on accuracy."""
        before = results["before finetuning"]
        reached = {name: Measured((before[name],) * len(self.seeds)) for name in (PLAIN, REWIRED)}
        for name in self.ways:
            values = tuple(results[f"{name}, seed {seed}"]["top1"] for seed in self.seeds)
            reached[name] = Measured(values)
        rows = [
            {
                "network": name,
                "top-1": found.mean,
                "deviation": found.deviation,
                "seeds": 1 if name in (PLAIN, REWIRED) else len(self.seeds),
                "every seed": list(found.values),
            }
            for name, found in reached.items()
        ]
        most, plain = max(self.epochs), reached[PLAIN]
        kinds = ("rewired", "plain", "moving", "scratch")
        best, control, moved, scratch = (reached[_named(kind, most)] for kind in kinds)
        claims = (
            ("It is as accurate as the plain network finetuned for as long", best, control),
            ("Dr2Net's schedule is as accurate as rewiring at once and finetuning", moved, best),
        )
        findings = [
            Finding(
                claim="Rewired and finetuned, the network is as accurate as the pretrained one",
                holds=at_least(best, plain, margin=_MARGIN),
                evidence=f"{best} against {plain.mean:.3f}",
            ),
            *(finding(claim, one, other, margin=_MARGIN) for claim, one, other in claims),
            finding(
                "The pretrained weights are the reason: from scratch it is worse",
                best,
                scratch,
                margin=-_MARGIN,
            ),
        ]
        return Section(
            title="Accuracy is preserved",
            text=(
                "Classification of held-out toy clips of 7 classes (chance: 0.143) by the backbone "
                "that the repository ships, pretrained without rewiring. An epoch of finetuning "
                f"shows {self.clips.training} training clips of 32 frames. The classifier is a "
                "linear layer, fitted to the features of the plain network and finetuned with the "
                f"backbone. Preserved means within {_MARGIN} of the plain network's top-1. Two "
                "numbers count as different if their mean difference over the seeds exceeds two "
                "standard errors."
            ),
            findings=findings,
            tables={"Top-1 on held-out clips": rows},
            figures={"accuracy": _picture(reached)},
            metrics={f"accuracy/{name}": found.mean for name, found in reached.items()},
        )


def _named(kind: str, epochs: int) -> str:
    titles = {
        "rewired": "rewired, finetuned",
        "moving": "Dr2Net's schedule,",
        "scratch": "rewired, from scratch,",
        "plain": "plain, finetuned",
    }
    return f"{titles[kind]} {epochs} {'epoch' if epochs == 1 else 'epochs'}"


def quick() -> Accuracy:
    """Configure one epoch of few clips, only to show that everything runs."""
    return Accuracy(
        seeds=(0,),
        epochs=(1,),
        clips=TrimmedToyConfig(training=14, validation=14, seconds=3.0),
        folder="data/toy_accuracy_quick",
    )


def _picture(reached: Mapping[str, Measured]) -> Figure:
    """Draw a bar for each network, and a dot for each seed."""
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


# Jobs.


def train_here(
    task: Task, weights: str | None, *, head: dict[str, Tensor] | None = None
) -> tuple[dict[str, float], Detector[Any, Any]]:
    """Train to the recipe's last epoch in this process, with the training loop of `train.py`.

    Args:
        task: model and data.
        weights: weights of the backbone, or None.
        head: initial weights of the layers after the backbone; None initializes them at random.

    Returns:
        Metrics of the last epoch, and the detector with the EMA weights that they belong to.
    """
    with tempfile.TemporaryDirectory() as folder:
        runtime = LocalRuntime(task.recipe, task.plan, Path(folder), device=device())
        trainer = Trainer(task, runtime, weights=weights, output=folder)
        if head is not None:
            for model in (trainer.state.detector, trainer.state.average.module):
                model.get_submodule("localizer").load_state_dict(head)
        return trainer.run(), trainer.state.averaged()


def make_clips(folder: Path, clips: TrimmedToyConfig) -> None:
    """Make the clips, and fit the classifier's head to the plain network's features of them.

    The repository ships weights of the backbone without a head. Files in the folder that the same
    settings and code made are kept.
    """
    toy_clips(folder, clips)
    facts = _facts(clips)
    if not _is_made(folder / _HEAD, facts):
        recipe, plan = _configured(str(folder))
        with replacing(folder / _HEAD) as partial:
            save_file(_fitted_head(recipe, plan), partial, metadata=facts)


def before_finetuning(*, folder: str) -> Result:
    """Measure top-1 of the pretrained network, and of the same weights with rewired connections."""
    recipe, plan = _configured(folder)
    head = load_file(Path(folder) / _HEAD)
    reached = {}
    for name, reversible in ((PLAIN, False), (REWIRED, True)):
        classifier = _built(recipe, plan, reversible=reversible)
        classifier.localizer.load_state_dict(head)
        scores, _ = score_videos(classifier, _clips_of(plan.validation, classifier, recipe, plan))
        reached[name] = accuracy_metrics(scores, plan.validation, prefix="test")["test/top1"]
    return reached


def finetuned(*, kind: str, epochs: int, seed: int, folder: str) -> Result:
    """Train, and measure top-1.

    Args:
        kind: "rewired" at once; "moving" from plain to rewired in the first half (Dr2Net); "plain";
            or "scratch", rewired with random weights.
        epochs: length of the training.
        seed: seed of clips, order and random weights.
        folder: folder of `make_clips`.
    """
    metrics, _ = _trained(kind, epochs, seed, folder)
    return {"top1": metrics["test/top1"]}


def finetune_backbone(path: Path, *, epochs: int, folder: Path, clips: TrimmedToyConfig) -> None:
    """Rewire the pretrained backbone, finetune it on clips of `make_clips`, and write its weights.

    This is step 4 of Re2TAL, whose result detectors with a reversible backbone start from. A file
    that the same settings and code made is kept.
    """
    facts = _facts(clips, epochs=epochs)
    if not _is_made(path, facts):
        metrics, detector = _trained("rewired", epochs, 0, str(folder))
        save_backbone_weights(detector.backbone, path, facts)
        reached = metrics["test/top1"]
        print(f"rewired and finetuned for {epochs} epochs: top-1 {reached:.3f}", flush=True)


def _facts(clips: TrimmedToyConfig, **settings: int) -> dict[str, str]:
    """Return the settings that weights depend on, in the form that the weights' file stores."""
    of = {"clips": asdict(clips), "code": code_fingerprint(), **settings}
    return {"made_with": json.dumps(of, sort_keys=True)}


def _is_made(path: Path, facts: Mapping[str, str]) -> bool:
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}) == facts


def _trained(
    kind: str, epochs: int, seed: int, folder: str
) -> tuple[dict[str, float], Detector[Any, Any]]:
    recipe, plan = _configured(folder)
    model = replace(
        recipe.model,
        reversible=kind != "plain",
        coupling_epochs=epochs / 2 if kind == "moving" else None,
        weights=None if kind == "scratch" else recipe.model.weights,
    )
    head = None if kind == "scratch" else load_file(Path(folder) / _HEAD)
    recipe = replace(recipe, model=model, epochs=epochs, evaluate_from=epochs, seed=seed)
    return train_here(ClassificationTask(recipe=recipe, plan=plan), model.weights, head=head)


def _configured(folder: str) -> tuple[ClassificationRecipe, ClassificationPlan]:
    """Configure the toy recipe for one process, on the clips of a folder."""
    recipe = toy()
    recipe = replace(
        recipe,
        data=replace(recipe.data, training=f"{folder}/training", validation=f"{folder}/validation"),
        views=ViewConfig(),
        scale=replace(recipe.scale, workers=1),
    )
    return recipe, make_plan(recipe.data, read_lists(recipe.data), probe=probe_files_here)


def _fitted_head(recipe: ClassificationRecipe, plan: ClassificationPlan) -> dict[str, Tensor]:
    """Fit a linear layer from the plain network's features to the classes."""
    classifier = _built(recipe, plan, reversible=False)
    with torch.no_grad():
        clips = _clips_of(plan.training, classifier, recipe, plan)
        frames = (classifier.normalized(batch.frames.to(device())) for batch in clips)
        features = torch.cat([classifier.backbone(x).mean(dim=2) for x in frames])  # (N, C)
    labels = torch.tensor([video.label for video in plan.training], device=features.device)
    head = classifier.localizer.linear
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # on linearly separable features, cross entropy without a penalty has no minimum
        penalty = 1e-3 * head.weight.square().sum()
        loss = F.cross_entropy(head(features), labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return {name: value.cpu() for name, value in classifier.localizer.state_dict().items()}


def _built(
    recipe: ClassificationRecipe, plan: ClassificationPlan, *, reversible: bool
) -> Classifier:
    recipe = replace(recipe, model=replace(recipe.model, reversible=reversible))
    return build_classifier(recipe, plan.classes, recipe.model.weights).eval().to(device())


def _clips_of(
    videos: Sequence[TrimmedVideo],
    classifier: Classifier,
    recipe: ClassificationRecipe,
    plan: ClassificationPlan,
) -> Iterator[Batch]:
    """Yield the middle clip of each video, in order."""
    data = recipe.data
    stride = classifier.backbone.temporal_stride
    windows = [w for video in videos for w in views(video, data.clip, ViewConfig(), stride=stride)]
    return decode_batches(windows, plan.uris, size=data.size, batch_size=recipe.batch_size)
