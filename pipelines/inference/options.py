"""Options of `detect.py` and `evaluate.py`, read before the slow imports of the work itself."""

from dataclasses import dataclass, field

import tyro

from pipelines.config.annotations import ScoredAnnotationConfig
from pipelines.config.recipe import PoolConfig
from pipelines.inference.output import OutputConfig
from re2tal.detection.suppression import NmsConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Hardware and batches of detection.

    Attributes:
        batch_size: number of windows in a forward pass.
        pool: actors, each with a detector; without GPUs, by default half as many as CPUs.
    """

    batch_size: int = 1
    pool: tyro.conf.OmitArgPrefixes[PoolConfig] = field(default_factory=PoolConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectConfig:
    """Videos, detector and output of a run.

    Attributes:
        videos: files, folders, and patterns such as "clips/*.mp4"; paths or URIs that pyarrow opens
            (s3://, gs://, ...).
        model: folder of a saved detector or of a checkpoint; or, in MLflow, the id of a training
            run, runs:/RUN/NAME or models:/NAME/VERSION.
        output: folder of the results.
        files: written formats, and the detections in them.
        resources: hardware and batches of detection.
        experiment: MLflow experiment.
        runs: folder of the default MLflow store, which has the training runs; MLFLOW_TRACKING_URI
            names another store.
    """

    videos: tuple[str, ...] = ()
    model: str | None = None
    output: str = "runs/detections"
    files: tyro.conf.OmitArgPrefixes[OutputConfig] = field(default_factory=OutputConfig)
    resources: tyro.conf.OmitArgPrefixes[Resources] = field(default_factory=Resources)
    experiment: str = "re2tal"
    runs: str = "runs"

    @property
    def name(self) -> str:
        """Name of the run in MLflow."""
        return "detect"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(ScoredAnnotationConfig):
    """Detections or detector, and the annotations that they are compared with.

    Attributes:
        detections: file of detections (JSON); or raw detections of one run, or of several runs for
            an ensemble (raw_detections.safetensors, kept by train.py --save-raw). Paths, URIs, or
            runs:/RUN/detections.json in MLflow. Give either detections or a model.
        weights: weight of each run in an ensemble; by default all weights are equal.
        nms: suppression of overlapping raw detections. In an ensemble, scores are weighted shares
            of a run's, and `min_score` is multiplied by the smallest share.
        model: folder of a saved detector or of a checkpoint; or, in MLflow, the id of a training
            run, runs:/RUN/NAME or models:/NAME/VERSION.
        videos: folder of the video files for a model, named by id, or of shards; a path or a URI.
        subset: evaluated subset; by default that of the data set, or "validation".
        thresholds: tIoU thresholds of mAP; by default those of the data set, or 0.3 to 0.7.
        recall_at: each k of Recall@kx, at the same thresholds; by default those of the data set (1
            for Ego4D), or none.
        ignore_ambiguous: ignore detections on stretches annotated as ambiguous, as THUMOS-14's own
            toolkit does.
        max_failed: largest share of the videos that may fail to be decoded; above it the run stops.
        output: folder of tables and pictures.
        resources: hardware and batches of a model.
        experiment: MLflow experiment.
        runs: folder of the default MLflow store; MLFLOW_TRACKING_URI names another store.
    """

    detections: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    nms: NmsConfig = field(default_factory=NmsConfig)
    model: str | None = None
    videos: str | None = None
    subset: str | None = None
    thresholds: tuple[float, ...] | None = None
    recall_at: tuple[int, ...] | None = None
    ignore_ambiguous: bool = False
    max_failed: float = 0.05
    output: str = "runs/evaluation"
    resources: tyro.conf.OmitArgPrefixes[Resources] = field(default_factory=Resources)
    experiment: str = "re2tal"
    runs: str = "runs"

    @property
    def name(self) -> str:
        """Name of the run in MLflow."""
        return "evaluate"

    @property
    def levels(self) -> tuple[float, ...]:
        """Thresholds of tIoU."""
        return self.thresholds or self.record.thresholds

    @property
    def ks(self) -> tuple[int, ...]:
        """Numbers k of Recall@kx."""
        return self.record.recall_at if self.recall_at is None else self.recall_at

    @property
    def evaluated_on(self) -> str:
        """Name of the evaluated subset."""
        return self.subset or self.record.validation
