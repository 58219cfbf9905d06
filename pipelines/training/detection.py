"""Detection task of the training loop: windows of untrimmed videos, mAP."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.config.recipe import Recipe
from pipelines.core.clock import duration
from pipelines.core.metric_names import MAP, VALIDATION_LOSS, WATCHED_MAP
from pipelines.data.batches import Video, epoch_windows
from pipelines.data.plan import Plan, all_failures
from pipelines.training.checkpoints import TrainingState
from pipelines.training.model import (
    build_detector,
    connect,
    detected_classes,
    load_localizer,
    reported_classes,
    spec_of,
)
from pipelines.training.trainer import Evaluated, Evaluation, EvaluationRuntime
from pipelines.training.validation import (
    MeanLoss,
    compare,
    detect_windows,
    gather,
    metrics_of,
    validation_share,
    watched_videos,
)
from re2tal.detection.files import write_detections
from re2tal.detection.raw import write_raw
from re2tal.detection.segments import Detections
from re2tal.detection.suppression import nms_videos
from re2tal.detection.video_scores import fuse_videos
from re2tal.detector import Detector
from re2tal.trained import DetectorSpec
from re2tal.videos.windows import Window

DETECTIONS_FILE = "detections.json"
RAW_FILE = "raw_detections.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionTask:
    """Temporal action localization, a `pipelines.training.trainer.Task`.

    Attributes:
        recipe: configuration of the run.
        plan: classes and usable videos.
        score: metric by which the best checkpoint is chosen.
    """

    recipe: Recipe
    plan: Plan
    score: str = MAP

    @property
    def trained(self) -> Plan:
        """Plan with the classes that the detector learns: all, or only "action"."""
        return self.plan.restricted(detected_classes(self.recipe, self.plan.classes))

    @property
    def reported(self) -> Plan:
        """Plan with the classes that its detections are evaluated on."""
        return self.plan.restricted(reported_classes(self.recipe, self.plan.classes))

    @property
    def spec(self) -> DetectorSpec:
        """Specification from which the detector is built."""
        return spec_of(self.recipe, self.plan.classes)

    def build(self, weights: str | Path | None) -> Detector[Any, Any]:
        """Build the detector, with the initial weights of its backbone and its localizer.

        Args:
            weights: file or name of backbone weights, or None.

        Raises:
            ValueError: see `build_detector` and `load_localizer`.
        """
        detector = build_detector(self.recipe, self.plan.classes, weights)
        load_localizer(detector, self.recipe.model)
        return detector

    def windows(self, *, stride: int, epoch: int) -> list[Window]:
        """Draw windows of all training videos at random places, shuffled; see `Task.windows`."""
        trained = self.trained
        return epoch_windows(
            trained.training,
            trained.classes,
            self.recipe.data.window,
            stride=stride,
            seed=self.recipe.seed,
            epoch=epoch,
            augmentation=self.recipe.data.augmentation,
        )

    def before_step(
        self,
        state: TrainingState,
        *,
        done: int,
        steps: int,
    ) -> dict[str, float]:
        """Set the coupling (Dr2Net's alpha and beta) of this step; see `connect`."""
        return connect(state.detector, self.recipe.model, done=done, steps=steps)

    def evaluate(
        self,
        state: Evaluated,
        runtime: EvaluationRuntime,
        *,
        steps: int,  # noqa: ARG002 - evaluated with the final coupling, with which it is saved
    ) -> Evaluation:
        """Detect the actions of all validation videos and compare them with the annotations.

        Raises:
            UserError: if too many videos could not be decoded.
        """
        before = time.perf_counter()
        detections, raw, failed, watched = self._detect(state, runtime)
        metrics = {"videos/failed": float(len(failed))}
        detections, quality = self.judged(detections)
        metrics |= quality | watched
        seen = f"mAP {metrics[MAP]:.3f}"
        if WATCHED_MAP in metrics:
            seen += f" ({metrics[WATCHED_MAP]:.3f} on training videos)"
        runtime.say(
            f"epoch {state.epoch}/{self.recipe.epochs}  validation  {seen}  "
            f"({len(detections)} videos, {duration(time.perf_counter() - before)})"
        )
        return Evaluation(
            metrics=metrics, write=partial(self._write, detections=detections, raw=raw)
        )

    def judged(
        self, detections: Mapping[str, Detections]
    ) -> tuple[dict[str, Detections], dict[str, float]]:
        """Evaluate detections, with the classes of an external classifier if there is one.

        Args:
            detections: detections in seconds by video id, after non-maximum suppression.

        Returns:
            The detections with classes, and the metrics by their names in MLflow.
        """
        reported, scores = self.reported, self.plan.video_scores
        proposals = detections if self.recipe.model.class_agnostic else None
        if scores is not None:
            detections = fuse_videos(detections, scores, top=self.recipe.data.video_scores_top)
        results = compare(
            detections,
            reported.validation,
            reported.classes,
            self.recipe.thresholds,
            proposals=proposals,
            ignore_ambiguous=self.recipe.ignore_ambiguous,
            ks=self.recipe.data.record.recall_at,
        )
        return dict(detections), metrics_of(results, reported.classes)

    def _detect(
        self, state: Evaluated, runtime: EvaluationRuntime
    ) -> tuple[dict[str, Detections], dict[str, Detections], dict[str, str], dict[str, float]]:
        """Detect the actions of all validation videos.

        Returns:
            Detections by video id after and before non-maximum suppression; reason by video id,
            where decoding failed; metrics that show whether the detector overfits.
        """
        recipe, plan = self.recipe, self.trained
        detector: Any = state.averaged().eval()
        loss = MeanLoss() if recipe.watched_videos else None
        name = f"epoch {state.epoch}, validation"
        raw, failures = self._raw(detector, runtime, plan.validation, loss, name=name)
        suppressed = nms_videos(raw, recipe.nms)
        failures = {**state.failures, **failures}
        watched = {} if loss is None else self._watched(detector, runtime, loss, name=name)
        shares = gather((suppressed, raw if recipe.save_raw else {}, failures))
        detections = {video: found for part in shares for video, found in part[0].items()}
        raw = {video: found for part in shares for video, found in part[1].items()}
        failed = all_failures(plan, (part[2] for part in shares), recipe.data.max_failed)
        return detections, raw, failed, watched

    def _raw(
        self,
        detector: Detector[Any, Any],
        runtime: EvaluationRuntime,
        videos: Sequence[Video],
        loss: MeanLoss | None = None,
        *,
        name: str,
    ) -> tuple[dict[str, Detections], dict[str, str]]:
        """Return detections of this worker's share of videos, and reasons where decoding failed."""
        windows = validation_share(
            videos,
            self.trained.classes,
            self.recipe.data.window,
            stride=detector.backbone.temporal_stride,
            rank=runtime.rank,
            world_size=runtime.world_size,
        )
        durations = {v.annotation.video_id: v.annotation.duration for v in videos}
        batches = runtime.stream(windows, size=self.recipe.data.size, name=name)
        return detect_windows(detector, batches, durations, loss=loss)

    def _watched(
        self,
        detector: Detector[Any, Any],
        runtime: EvaluationRuntime,
        loss: MeanLoss,
        *,
        name: str,
    ) -> dict[str, float]:
        """Return the validation loss, and the mAP on a fixed handful of training videos."""
        mean = loss.gathered()
        metrics = {} if mean is None else {VALIDATION_LOSS: mean}
        plan = self.trained
        videos = watched_videos(plan.training, plan.validation, self.recipe.watched_videos)
        # an external classifier has scores for validation videos only
        if not videos or plan.video_scores is not None:
            return metrics
        raw, _ = self._raw(detector, runtime, videos, name=f"{name} on training videos")
        shares = gather(nms_videos(raw, self.recipe.nms))
        found = {video: of_video for share in shares for video, of_video in share.items()}
        results = compare(
            found,
            videos,
            plan.classes,
            self.recipe.thresholds,
            ignore_ambiguous=self.recipe.ignore_ambiguous,
        )
        return metrics | {WATCHED_MAP: metrics_of(results, plan.classes)[MAP]}

    def _write(
        self,
        folder: Path,
        *,
        detections: Mapping[str, Detections],
        raw: Mapping[str, Detections],
    ) -> None:
        write_detections(folder / DETECTIONS_FILE, detections, self.reported.classes)
        if self.recipe.save_raw:
            write_raw(folder / RAW_FILE, raw, self.trained.classes)
