"""The complete, typed configuration of a training run of `train.py`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipelines.settings import BackboneModelConfig, RunConfig
from re2tal.components import Component
from re2tal.detection.nms import NmsConfig
from re2tal.localizers.protocol import LocalizerConfig
from re2tal.videos.annotations import Form
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.windows import WindowConfig

Dataset = Literal[
    "activitynet-1.3",
    "thumos-14",
    "multithumos",
    "hacs-segments",
    "fineaction",
    "epic-kitchens-100",
    "ego4d-mq",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which videos, and how they are cut into windows.

    Attributes:
        annotations: ActivityNet-style JSON, or one of the other forms that
            `re2tal.videos.annotations` reads; a path or, for a single file, a URI that pyarrow
            opens (s3://, gs://, ...).
        form: how the annotations are laid out; "auto" looks at them.
        dataset: what is known to be wrong in this data set is repaired, listed and logged; by
            default any fault in the annotations is an error.
        exclude: file with ids of videos to leave out, such as those that cannot be had any more:
            one a line, or JSON.
        keep: ids of videos that count although `dataset` leaves them out, as they do in some
            published results.
        videos: folder of the video files, named by id; a path or a URI.
        features: folder of features (extract_features.py, or others': `pipelines.features`); a path
            or a URI. The localizer is then trained on them, without videos and backbone.
        make_toy: make the toy data set at these two places when it is missing.
        training_subset: name of the subset that is trained on.
        validation_subset: name of the subset that is evaluated after every epoch.
        size: pixels of a frame's side: the short side is resized to it, the centre is cut out.
        window: cut at random places for training, overlapping for the evaluation.
        augmentation: what is changed at random in training windows.
        max_failed: stop when more than this share of the videos cannot be used.
        video_scores: for a class-agnostic model, what an external classifier says of the
            validation videos (`re2tal.detection.video_scores`); a path or a URI.
        video_scores_top: of each video so many of these classes are given to each proposal.
        video_scores_logits: the file holds logits (HACS), of which a softmax makes scores.

    Raises:
        ValueError: crops would be taken from frames smaller than `size`.
    """

    annotations: str | None = None
    form: Form = "auto"
    dataset: Dataset | None = None
    exclude: str | None = None
    keep: tuple[str, ...] = ()
    videos: str | None = None
    features: str | None = None
    make_toy: bool = False
    training_subset: str = "training"
    validation_subset: str = "validation"
    size: int = 224
    window: WindowConfig
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    max_failed: float = 0.05
    video_scores: str | None = None
    video_scores_top: int = 2
    video_scores_logits: bool = False

    def __post_init__(self) -> None:
        decoded = self.augmentation.decoded_size(self.size)
        if decoded < self.size:
            raise ValueError(
                f"DataConfig.augmentation.source_size of {decoded} pixels is below "
                f"DataConfig.size of {self.size}: crops are taken from frames at least as large."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(BackboneModelConfig):
    """The detector: backbone and localizer.

    Attributes:
        localizer: what turns features into segments.
        class_agnostic: find actions of whatever class; their classes come from
            `data.video_scores` or, without it, the proposals themselves are evaluated.
    """

    localizer: Annotated[LocalizerConfig, Component()]
    class_agnostic: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(RunConfig):
    """The complete configuration of one training run.

    Attributes:
        data: which videos.
        model: what is trained.
        nms: how detections that overlap are thinned out.
        thresholds: tIoU thresholds of the mAP; the mean over them selects the best checkpoint.
        ignore_ambiguous: detections on stretches that cannot be judged count for nothing, as in
            THUMOS-14's own toolkit. Published results count them as false positives.
        save_raw: keep the detections before non-maximum suppression with each checkpoint, for
            ensembles and for searching its settings without training.

    Raises:
        ValueError: settings contradict one another.
    """

    experiment: str = "re2tal"
    data: DataConfig
    model: ModelConfig
    nms: NmsConfig = field(default_factory=NmsConfig)
    thresholds: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    ignore_ambiguous: bool = False
    save_raw: bool = False

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        self.model.check_epochs(self.epochs)
        if self.scale.sharded and self.optim.precision == "float16":
            raise ValueError(
                "Recipe.scale.sharded goes with Recipe.optim.precision bfloat16 or float32: the "
                "scale of a float16 loss is not agreed on between the workers."
            )
