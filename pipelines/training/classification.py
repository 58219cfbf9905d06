"""Classification task of the training loop: clips of trimmed videos, top-1, coupling schedule."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from pipelines.config.clip_recipes import ClassificationRecipe
from pipelines.core.clock import duration
from pipelines.data.batches import Batch, generators
from pipelines.data.clip_plan import ClassificationPlan
from pipelines.data.plan import all_failures
from pipelines.training.checkpoints import TrainingState
from pipelines.training.model import build_prepared, connect
from pipelines.training.trainer import Evaluated, Evaluation, EvaluationRuntime
from pipelines.training.validation import gather
from re2tal.classifier import Classifier, class_scores, mean_class_accuracy, top_k_accuracy
from re2tal.datasets.trimmed import TrimmedVideo, ViewConfig, random_clip, views
from re2tal.errors import UserError
from re2tal.trained import DetectorSpec
from re2tal.videos.windows import Window, reversed_window


@torch.inference_mode()
def score_videos(
    classifier: Classifier, batches: Iterable[Batch]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Average the scores of the views of each video.

    Args:
        classifier: classifier in evaluation mode.
        batches: views; those of one video may lie in several batches.

    Returns:
        Mean probabilities `(K,)`, float64, by video id, over the views that could be decoded;
        reason by video id, where a view could not be decoded.
    """
    device = next(classifier.parameters()).device
    views: dict[str, list[Tensor]] = defaultdict(list)
    failures: dict[str, str] = {}
    for batch in batches:
        failures |= batch.failures
        scores = class_scores(classifier, batch.frames.to(device), batch.mask.to(device))
        shown = batch.mask.any(dim=1).tolist()  # a view that cannot be decoded is masked whole
        for window, of_view, there in zip(batch.windows, scores.cpu(), shown, strict=True):
            if there:
                views[window.video_id].append(of_view.double())
    return {video_id: torch.stack(of).mean(dim=0) for video_id, of in views.items()}, failures


def accuracy_metrics(
    scores: Mapping[str, Tensor], videos: Sequence[TrimmedVideo], *, prefix: str
) -> dict[str, float]:
    """Compute top-1, top-5 and mean class accuracy.

    Args:
        scores: scores `(K,)` by video id; videos without scores are not counted.
        videos: videos with their labels; at least one has scores.
        prefix: first part of the metrics' names.

    Returns:
        `<prefix>/top1`, `<prefix>/top5`, `<prefix>/mean_class_accuracy`.
    """
    scored = [video for video in videos if video.video_id in scores]
    of_all = torch.stack([scores[video.video_id] for video in scored])
    labels = torch.tensor([video.label for video in scored])
    return {
        f"{prefix}/top1": top_k_accuracy(of_all, labels, 1),
        f"{prefix}/top5": top_k_accuracy(of_all, labels, 5),
        f"{prefix}/mean_class_accuracy": mean_class_accuracy(of_all, labels),
    }


def spec_of(recipe: ClassificationRecipe, classes: Sequence[str]) -> DetectorSpec:
    """Return the specification from which the recipe's classifier is built."""
    model, data = recipe.model, recipe.data
    return DetectorSpec(
        classes=tuple(classes),
        backbone=model.backbone,
        localizer=model.head,
        reversible=model.reversible,
        size=data.size,
        window=data.window,
        mean=model.mean,
        std=model.std,
    )


def build_classifier(
    recipe: ClassificationRecipe, classes: Sequence[str], weights: str | Path | None
) -> Classifier:
    """Build the classifier, with pretrained weights in its backbone.

    Args:
        recipe: configuration of the run.
        classes: names of the classes.
        weights: file or name of backbone weights, or None.

    Raises:
        ValueError: see `build_prepared`.
    """
    return build_prepared(spec_of(recipe, classes), weights, recipe.model)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationTask:
    """Classification of trimmed videos, a `pipelines.training.trainer.Task`.

    Attributes:
        recipe: configuration of the run.
        plan: classes and usable videos.
        score: metric by which the best checkpoint is chosen.
    """

    recipe: ClassificationRecipe
    plan: ClassificationPlan
    score: str = "val/top1"

    @property
    def spec(self) -> DetectorSpec:
        """Specification from which the classifier is built."""
        return spec_of(self.recipe, self.plan.classes)

    def build(self, weights: str | Path | None) -> Classifier:
        """Build the classifier; see `build_classifier`."""
        return build_classifier(self.recipe, self.plan.classes, weights)

    def windows(self, *, stride: int, epoch: int) -> list[Window]:
        """Draw one random clip of every training video, shuffled; see `Task.windows`."""
        random, changes = generators(self.recipe.seed, epoch)
        data = self.recipe.data
        windows = []
        for video in self.plan.training:
            tempo = data.augmentation.tempo(changes)
            # at speed s, frames lie s times as far apart
            clip = replace(data.clip, fps=data.clip.fps / tempo.speed)
            window = random_clip(video, clip, stride=stride, random=random)
            windows.append(reversed_window(window) if tempo.backwards else window)
        return [windows[i] for i in random.permutation(len(windows))]

    def before_step(self, state: TrainingState, *, done: int, steps: int) -> dict[str, float]:
        """Set the coupling (Dr2Net's alpha and beta) of this step; see `connect`."""
        return connect(state.detector, self.recipe.model, done=done, steps=steps)

    def evaluate(self, state: Evaluated, runtime: EvaluationRuntime, *, steps: int) -> Evaluation:
        """Evaluate the averaged classifier on the middle clips; after the last epoch on all views.

        Raises:
            UserError: if too many videos could not be decoded.
        """
        classifier = cast("Classifier", state.averaged()).eval()
        connect(classifier, self.recipe.model, done=state.epoch * steps, steps=steps)
        metrics = self._test(classifier, state, runtime, ViewConfig(), prefix="val")
        if state.epoch == self.recipe.epochs:
            metrics |= self._test(classifier, state, runtime, self.recipe.views, prefix="test")
        return Evaluation(metrics=metrics, write=_nothing)

    def _test(
        self,
        classifier: Classifier,
        state: Evaluated,
        runtime: EvaluationRuntime,
        view: ViewConfig,
        *,
        prefix: str,
    ) -> dict[str, float]:
        before = time.perf_counter()
        data, plan = self.recipe.data, self.plan
        stride = classifier.backbone.temporal_stride
        mine = plan.validation[runtime.rank :: runtime.world_size]
        windows = [w for video in mine for w in views(video, data.clip, view, stride=stride)]
        name = f"epoch {state.epoch}, {prefix}"
        batches = runtime.stream(windows, size=data.size, name=name)
        scores, failures = score_videos(classifier, batches)
        shares = gather((scores, {**state.failures, **failures}))
        failed = all_failures(plan, (of_worker for _, of_worker in shares), data.max_failed)
        everyone = {video_id: found for part, _ in shares for video_id, found in part.items()}
        if not everyone:
            raise UserError("No validation video can be decoded.")
        metrics = accuracy_metrics(everyone, plan.validation, prefix=prefix)
        metrics["videos/failed"] = float(len(failed))
        of = f"{view.clips} x {view.crops} views, " if prefix == "test" else ""
        # with up to five classes, top-5 is always 1
        top5 = f"top-5 {metrics[f'{prefix}/top5']:.3f}  " if len(plan.classes) > 5 else ""
        runtime.say(
            f"epoch {state.epoch}/{self.recipe.epochs}  {prefix}  "
            f"top-1 {metrics[f'{prefix}/top1']:.3f}  {top5}"
            f"({of}{len(everyone)} {data.counted}, {duration(time.perf_counter() - before)})"
        )
        return metrics


def _nothing(folder: Path) -> None:
    """Write no further files: the checkpoint holds the classifier."""
