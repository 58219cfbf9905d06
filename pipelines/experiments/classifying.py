"""Classifiers of toy clips: the pretrained one as it is, and trained further in several ways."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.config.clip_recipes import toy
from pipelines.config.recipe import ClassificationRecipe
from pipelines.data.batches import Batch, decode_batches
from pipelines.data.clip_plan import ClassificationPlan, make_plan, read_lists
from pipelines.data.toy import toy_clips
from pipelines.data.videos import probe_files_here
from pipelines.experiments.device import device
from pipelines.experiments.experiment import Result
from pipelines.experiments.records import code_fingerprint
from pipelines.experiments.training import Trained, train_here
from pipelines.training.classification import (
    ClassificationTask,
    accuracy_metrics,
    build_classifier,
    score_videos,
)
from re2tal.atomic import replacing
from re2tal.backbones.weights import save_backbone_weights
from re2tal.classifier import Classifier
from re2tal.datasets.toy import TrimmedToyConfig
from re2tal.datasets.trimmed import TrimmedVideo, ViewConfig, views

PLAIN, REWIRED = "plain, pretrained", "rewired, not finetuned"
_HEAD = "head.safetensors"


def make_clips(folder: Path, clips: TrimmedToyConfig) -> None:
    """Makes the clips, and fits the classifier's head to the plain network's features of them.

    The weights that the repository ships are those of a backbone alone.

    Args:
        folder: where to; what is there and was made with the same settings and code stays.
        clips: how many.
    """
    toy_clips(folder, clips)
    facts = _facts(clips)
    if not _is_made(folder / _HEAD, facts):
        recipe, plan = _configured(str(folder))
        with replacing(folder / _HEAD) as partial:
            save_file(_fitted_head(recipe, plan), partial, metadata=facts)


def before_finetuning(*, folder: str) -> Result:
    """Top-1 of the pretrained network, and of the same weights with rewired connections.

    Args:
        folder: of the clips, see `make_clips`.
    """
    recipe, plan = _configured(folder)
    head = load_file(Path(folder) / _HEAD)
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
        folder: of the clips, see `make_clips`.
    """
    trained = _trained(kind, epochs, seed, folder)
    return {"top1": trained.metrics["test/top1"], "seconds": trained.seconds}


def finetune_backbone(path: Path, *, epochs: int, folder: Path, clips: TrimmedToyConfig) -> None:
    """Rewires the pretrained backbone, finetunes it on clips, and writes its weights.

    Step 4 of Re2TAL: what detectors with a reversible backbone start from.

    Args:
        path: of the weights, safetensors. What was made with the same settings and code stays.
        epochs: how long.
        folder: of the clips, see `make_clips`.
        clips: how many they are.
    """
    facts = _facts(clips, epochs=epochs)
    if not _is_made(path, facts):
        trained = _trained("rewired", epochs, 0, str(folder))
        save_backbone_weights(trained.detector.backbone, path, facts)
        reached = trained.metrics["test/top1"]
        print(f"rewired and finetuned for {epochs} epochs: top-1 {reached:.3f}", flush=True)


def _facts(clips: TrimmedToyConfig, **settings: int) -> dict[str, str]:
    """What weights depend on, as it is kept with them."""
    of = {"clips": asdict(clips), "code": code_fingerprint(), **settings}
    return {"made_with": json.dumps(of, sort_keys=True)}


def _is_made(path: Path, facts: Mapping[str, str]) -> bool:
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}) == facts


def _trained(kind: str, epochs: int, seed: int, folder: str) -> Trained:
    """See `finetuned`."""
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
    """A linear layer that reads the classes off the plain network's features."""
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
