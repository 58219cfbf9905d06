"""The complete, typed configuration of a run of `finetune_backbone.py`."""

from dataclasses import dataclass, field

from pipelines.settings import BackboneModelConfig, CheckpointConfig, RunConfig
from re2tal.classifier import ClipClassifierConfig
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.trimmed import ClipConfig, ViewConfig
from re2tal.videos.windows import WindowConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimmedDataConfig:
    """Which trimmed videos, and how clips are cut from them.

    Attributes:
        training: a folder with a folder of videos for each class, or a list of videos: Kinetics'
            own CSV, a CSV with `path` and `label`, or lines of `path label` (described in
            `re2tal.videos.trimmed.lists`); a path or a URI.
        validation: likewise, what is evaluated after every epoch.
        videos: folder that the paths in lists are in; a path or a URI.
        classes: file with the names of all classes, one a line; needed where lists have numbers.
            None takes the classes of the training videos, sorted.
        training_split: of a list with a column `split` only these rows; None for all.
        validation_split: likewise.
        make_toy: make the toy data set's trimmed split when there is nothing at `training`.
        size: pixels of a frame's side: the short side is resized to it.
        clip: frames of a clip and their rate.
        augmentation: what is changed at random in training clips.
        max_failed: stop when more than this share of the videos cannot be used. Of Kinetics some
            are always lost.

    Raises:
        ValueError: crops would be taken from frames smaller than `size`.
    """

    training: str | None = None
    validation: str | None = None
    videos: str | None = None
    classes: str | None = None
    training_split: str | None = None
    validation_split: str | None = None
    make_toy: bool = False
    size: int = 224
    clip: ClipConfig = field(default_factory=ClipConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    max_failed: float = 0.05

    def __post_init__(self) -> None:
        decoded = self.augmentation.decoded_size(self.size)
        if decoded < self.size:
            raise ValueError(
                f"TrimmedDataConfig.augmentation.source_size of {decoded} pixels is below "
                f"TrimmedDataConfig.size of {self.size}: crops are taken from frames at least as "
                "large."
            )

    @property
    def window(self) -> WindowConfig:
        """How a classifier cuts longer videos than clips."""
        return WindowConfig(frames=self.clip.frames, fps=self.clip.fps)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierModelConfig(BackboneModelConfig):
    """The classifier: backbone and a linear layer. Without `reversible`, this is plain pretraining.

    Attributes:
        head: what turns features into classes.
    """

    head: ClipClassifierConfig = field(default_factory=ClipClassifierConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationRecipe(RunConfig):
    """The complete configuration of one run of `finetune_backbone.py`.

    An epoch shows one clip of each training video. `optim.localizer_lr` is the learning rate of the
    classifier's head. Whatever checkpoints are kept, the result is the last epoch's.

    Attributes:
        data: which videos.
        model: what is trained.
        views: of which the scores are averaged in the last evaluation; those after every epoch look
            at the middle clip.
        weights_file: where the backbone's weights are written as well; replaced.

    Raises:
        ValueError: settings contradict one another.
    """

    experiment: str = "re2tal-backbones"
    data: TrimmedDataConfig
    model: ClassifierModelConfig
    views: ViewConfig = field(default_factory=lambda: ViewConfig(clips=4, crops=3))
    weights_file: str | None = None
    checkpoints: CheckpointConfig = field(
        default_factory=lambda: CheckpointConfig(keep=1, which="last")
    )

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        self.model.check_epochs(self.epochs)
