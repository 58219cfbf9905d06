"""What the training loop does to classify trimmed videos: clips, evaluation, moving connections."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from pipelines.checkpoints import TrainingState
from pipelines.classification.evaluation import accuracy_metrics, score_videos
from pipelines.classification.plan import ClassificationPlan
from pipelines.classification.recipe import ClassificationRecipe
from pipelines.clock import duration
from pipelines.coupling import connect
from pipelines.loop import Runtime
from pipelines.plan import UnusableVideosError, all_failures
from pipelines.start import prepare
from pipelines.task import Evaluation
from pipelines.validation import gather
from re2tal.classifier import Classifier
from re2tal.trained import DetectorSpec
from re2tal.videos.trimmed import ViewConfig, random_clip, views
from re2tal.videos.windows import Window


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
    """Classification of trimmed videos, a `pipelines.task.Task`.

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
            UnusableVideosError: if too many videos could not be decoded.
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
            raise UnusableVideosError("No validation video can be decoded.")
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
