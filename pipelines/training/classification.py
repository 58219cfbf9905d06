"""What the training loop does to classify trimmed videos: clips, evaluation, moving connections."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from pipelines.config.recipe import ClassificationRecipe
from pipelines.core.clock import duration
from pipelines.data.batches import Batch
from pipelines.data.clip_plan import ClassificationPlan
from pipelines.data.plan import all_failures
from pipelines.training.checkpoints import TrainingState
from pipelines.training.model import connect, prepare
from pipelines.training.trainer import Evaluation, Runtime
from pipelines.training.validation import gather
from re2tal.accuracy import mean_class_accuracy, top_k_accuracy
from re2tal.classifier import Classifier, class_scores
from re2tal.datasets.trimmed import TrimmedVideo, ViewConfig, random_clip, views
from re2tal.errors import UserError
from re2tal.trained import DetectorSpec
from re2tal.videos.windows import Window


@torch.inference_mode()
def score_videos(
    classifier: Classifier, batches: Iterable[Batch]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Averages the scores of the views of each video.

    Args:
        classifier: in evaluation mode.
        batches: views; a video's may lie in several batches.

    Returns:
        Video id to its mean probabilities `(K,)`, float64, over the views that could be decoded;
        video id to reason where one could not.
    """
    device = next(classifier.parameters()).device
    views: dict[str, list[Tensor]] = defaultdict(list)
    failures: dict[str, str] = {}
    for batch in batches:
        failures |= batch.failures
        scores = class_scores(classifier, batch.frames.to(device), batch.mask.to(device))
        shown = batch.mask.any(dim=1).tolist()
        for window, of_view, there in zip(batch.windows, scores.cpu(), shown, strict=True):
            if there:
                views[window.video_id].append(of_view.double())
    return {video_id: torch.stack(of).mean(dim=0) for video_id, of in views.items()}, failures


def accuracy_metrics(
    scores: Mapping[str, Tensor], videos: Sequence[TrimmedVideo], *, prefix: str
) -> dict[str, float]:
    """How often the classes of videos are recognised.

    Args:
        scores: video id to scores `(K,)`; videos without count nothing.
        videos: with their labels; at least one has scores.
        prefix: of the metrics' names.

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
    """Returns what the recipe's classifier is built of.

    Args:
        recipe: the run's configuration.
        classes: names of the classes.
    """
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
    """Builds the classifier, with pretrained weights in its backbone.

    Args:
        recipe: the run's configuration.
        classes: names of the classes.
        weights: file or name of backbone weights, or None.

    Raises:
        ValueError: see `prepare`.
    """
    classifier = spec_of(recipe, classes).build()
    prepare(classifier, weights, recipe.model)
    return classifier


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationTask:
    """Classification of trimmed videos, a `pipelines.training.trainer.Task`.

    Attributes:
        recipe: the run's configuration.
        plan: classes and usable videos.
        score: the metric that makes a checkpoint the best.
    """

    recipe: ClassificationRecipe
    plan: ClassificationPlan
    score: str = "val/top1"

    @property
    def spec(self) -> DetectorSpec:
        """What the classifier is built of."""
        return spec_of(self.recipe, self.plan.classes)

    def build(self, weights: str | Path | None) -> Classifier:
        """Builds the classifier, with pretrained weights in its backbone.

        Args:
            weights: file or name of backbone weights, or None.

        Raises:
            ValueError: as `build_classifier`.
        """
        return build_classifier(self.recipe, self.plan.classes, weights)

    def windows(self, *, stride: int, epoch: int) -> list[Window]:
        """One random clip of every training video, shuffled.

        Args:
            stride: frames per feature, of the backbone.
            epoch: from 0; another epoch has other clips in another order.
        """
        random = np.random.default_rng((self.recipe.seed, epoch))
        clip = self.recipe.data.clip
        windows = [
            random_clip(video, clip, stride=stride, random=random) for video in self.plan.training
        ]
        return [windows[i] for i in random.permutation(len(windows))]

    def before_step(self, state: TrainingState, *, done: int, steps: int) -> dict[str, float]:
        """Moves the connections to where they are to be after the steps that were taken (Dr2Net).

        Args:
            state: the classifier.
            done: steps before this one.
            steps: of an epoch.

        Returns:
            Metrics: where they are.
        """
        return connect(state.detector, self.recipe.model, done=done, steps=steps)

    def evaluate(self, state: TrainingState, runtime: Runtime, *, steps: int) -> Evaluation:
        """Evaluates the averaged classifier on the middle clips; after the last epoch on all views.

        Args:
            state: the classifier after an epoch.
            runtime: gives clips and shows progress.
            steps: of an epoch.

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
        state: TrainingState,
        runtime: Runtime,
        view: ViewConfig,
        *,
        prefix: str,
    ) -> dict[str, float]:
        before = time.perf_counter()
        data, plan = self.recipe.data, self.plan
        stride = classifier.backbone.temporal_stride
        mine = plan.validation[runtime.rank :: runtime.world_size]
        windows = [w for video in mine for w in views(video, data.clip, view, stride=stride)]
        scores, failures = score_videos(classifier, runtime.stream(windows, size=data.size))
        shares = gather((scores, {**state.failures, **failures}))
        failed = all_failures(plan, (of_worker for _, of_worker in shares), data.max_failed)
        everyone = {video_id: found for part, _ in shares for video_id, found in part.items()}
        if not everyone:
            raise UserError("No validation video can be decoded.")
        metrics = accuracy_metrics(everyone, plan.validation, prefix=prefix)
        metrics["videos/failed"] = float(len(failed))
        of = f"{view.clips} x {view.crops} views, " if prefix == "test" else ""
        runtime.say(
            f"epoch {state.epoch}/{self.recipe.epochs}  {prefix}  "
            f"top-1 {metrics[f'{prefix}/top1']:.3f}  top-5 {metrics[f'{prefix}/top5']:.3f}  "
            f"({of}{len(everyone)} videos, {duration(time.perf_counter() - before)})"
        )
        return metrics


def _nothing(folder: Path) -> None:
    """Nothing but the classifier itself is kept with its checkpoint."""
