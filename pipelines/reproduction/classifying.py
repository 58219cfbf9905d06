"""Classifiers of toy clips: the pretrained one as it is, and trained further in several ways."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.classification.evaluation import accuracy_metrics, score_videos
from pipelines.classification.plan import ClassificationPlan, make_plan, read_lists
from pipelines.classification.recipe import ClassificationRecipe
from pipelines.classification.recipes import toy
from pipelines.classification.task import ClassificationTask, build_classifier
from pipelines.collection import probe_files_here
from pipelines.data import Batch, decode_batches
from pipelines.reproduction.device import device
from pipelines.reproduction.experiment import Result
from pipelines.reproduction.training import train_here
from re2tal.classifier import Classifier
from re2tal.videos.trimmed import TrimmedVideo, ViewConfig, views

PLAIN, REWIRED = "plain, pretrained", "rewired, not finetuned"


def before_finetuning(*, folder: str) -> Result:
    """Top-1 of the pretrained network, and of the same weights with rewired connections.

    Args:
        folder: of the toy clips.
    """
    recipe, plan = _configured(folder)
    head = _fitted_head(recipe, plan)
    reached = {}
    for name, reversible in ((PLAIN, False), (REWIRED, True)):
        model = replace(recipe.model, reversible=reversible)
        classifier = _built(replace(recipe, model=model), plan)
        classifier.localizer.load_state_dict(head)
        scores, _ = score_videos(classifier, _clips_of(plan.validation, classifier, recipe, plan))
        reached[name] = accuracy_metrics(scores, plan.validation, prefix="test")["test/top1"]
    return reached


def finetuned(*, kind: str, epochs: int, seed: int, folder: str) -> Result:
    """Top-1 after a training.

    Args:
        kind: "rewired" at once, "moving" from plain to rewired in the first half (Dr2Net), "plain",
            or "scratch": rewired with random weights.
        epochs: how long.
        seed: of clips, order and random weights.
        folder: of the toy clips.
    """
    recipe, plan = _configured(folder)
    model = replace(
        recipe.model,
        reversible=kind != "plain",
        coupling_epochs=epochs / 2 if kind == "moving" else None,
        weights=None if kind == "scratch" else recipe.model.weights,
    )
    head = None if kind == "scratch" else _fitted_head(recipe, plan)
    recipe = replace(recipe, model=model, epochs=epochs, seed=seed)
    task = ClassificationTask(recipe=recipe, plan=plan)
    metrics, seconds = train_here(task, model.weights, head=head)
    return {"top1": metrics["test/top1"], "seconds": seconds}


def _configured(folder: str) -> tuple[ClassificationRecipe, ClassificationPlan]:
    """The toy recipe for one process, on the clips of a folder."""
    recipe = toy()
    recipe = replace(
        recipe,
        data=replace(recipe.data, training=f"{folder}/training", validation=f"{folder}/validation"),
        views=ViewConfig(),
        scale=replace(recipe.scale, workers=1),
    )
    return recipe, make_plan(recipe.data, read_lists(recipe.data), probe=probe_files_here)


def _fitted_head(recipe: ClassificationRecipe, plan: ClassificationPlan) -> dict[str, Tensor]:
    """A linear layer that reads the classes off the plain network's features.

    The weights that the repository ships are those of a backbone alone.
    """
    plain = replace(recipe, model=replace(recipe.model, reversible=False))
    classifier = _built(plain, plan)
    features = _features(classifier, recipe, plan)
    labels = torch.tensor([video.label for video in plan.training], device=features.device)
    head = classifier.localizer.linear
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = 1e-3 * head.weight.square().sum()
        loss = F.cross_entropy(head(features), labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return {name: value.cpu() for name, value in classifier.localizer.state_dict().items()}


@torch.no_grad()
def _features(
    classifier: Classifier, recipe: ClassificationRecipe, plan: ClassificationPlan
) -> Tensor:
    """The mean of the features of each training clip, (N, C)."""
    means = [
        classifier.backbone(classifier.normalized(batch.frames.to(device()))).mean(dim=2)
        for batch in _clips_of(plan.training, classifier, recipe, plan)
    ]
    return torch.cat(means)


def _built(recipe: ClassificationRecipe, plan: ClassificationPlan) -> Classifier:
    return build_classifier(recipe, plan.classes, recipe.model.weights).eval().to(device())


def _clips_of(
    videos: Sequence[TrimmedVideo],
    classifier: Classifier,
    recipe: ClassificationRecipe,
    plan: ClassificationPlan,
) -> Iterator[Batch]:
    """The middle of each video, in order."""
    data = recipe.data
    stride = classifier.backbone.temporal_stride
    windows = [w for video in videos for w in views(video, data.clip, ViewConfig(), stride=stride)]
    return decode_batches(windows, plan.uris, size=data.size, batch_size=recipe.batch_size)
