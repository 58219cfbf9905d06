"""Configurations of `finetune_backbone.py`: a run is a function that returns a complete one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from pipelines.recipes import TOY_WEIGHTS, CheckpointConfig, OptimConfig, ScaleConfig
from re2tal.backbones.protocol import BackboneConfig
from re2tal.backbones.slowfast import slowfast_101
from re2tal.backbones.swin import swin_t, swin_toy
from re2tal.classifier import ClipClassifierConfig
from re2tal.trained import IMAGENET_MEAN, IMAGENET_STD
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.trimmed import ClipConfig, ViewConfig
from re2tal.videos.windows import WindowConfig

TOY_TRIMMED = "data/toy_trimmed"


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
class ClassifierModelConfig:
    """The classifier: backbone and a linear layer.

    Attributes:
        backbone: the video backbone.
        weights: pretrained weights of the backbone: path or URI, also of an artifact or a model in
            MLflow, or a name as `torchvision:swin3d_t/KINETICS400_V1`; None starts at random.
        mean: of red, green and blue in [0, 1] that the backbone was pretrained with.
        std: their standard deviation.
        reversible: rewire the backbone (Re2TAL); without it, this is plain pretraining.
        coupling_epochs: epochs over which the connections move from the pretrained network's to the
            rewired ones, step by step (Dr2Net's alpha from 1 to 0 and beta from 0 to 1); None
            rewires at once. Activations are stored until it is through.
        frozen: names of modules that are not trained, such as "backbone.patch_embed".
        norms: of the norm layers of the backbone: "trained"; "statistics" keeps the running
            statistics of BatchNorms as they are; "frozen" keeps scale and shift of all norms too.
        head: what turns features into classes.
    """

    backbone: BackboneConfig
    weights: str | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    reversible: bool = True
    coupling_epochs: float | None = None
    frozen: tuple[str, ...] = ()
    norms: Literal["trained", "statistics", "frozen"] = "trained"
    head: ClipClassifierConfig = field(default_factory=ClipClassifierConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationRecipe:
    """The complete configuration of one run of `finetune_backbone.py`.

    Attributes:
        name: of the recipe; the MLflow run is named after it.
        experiment: MLflow experiment.
        output: folder of checkpoints and of the default MLflow store.
        weights_file: where the backbone's weights are written as well; replaced.
        seed: of weights, clips, order and dropout.
        epochs: passes over the training videos, of each of which an epoch shows one clip.
        batch_size: clips of a worker's forward pass. A step has `scale.workers` times
            `optim.accumulation` times as many.
        resume: go on with the last run of the same configuration and data if it did not end.
        data: which videos.
        model: what is trained.
        optim: `localizer_lr` is the learning rate of the classifier's head.
        views: of which the scores are averaged in the last evaluation; those after every epoch look
            at the middle clip.
        scale: how the run is laid over the cluster.
        checkpoints: which are written and kept. The result is the last epoch's in any case.

    Raises:
        ValueError: settings contradict one another.
    """

    name: str
    experiment: str = "re2tal-backbones"
    output: str = "runs"
    weights_file: str | None = None
    seed: int = 0
    epochs: int
    batch_size: int
    resume: bool = True
    data: TrimmedDataConfig
    model: ClassifierModelConfig
    optim: OptimConfig
    views: ViewConfig = field(default_factory=lambda: ViewConfig(clips=4, crops=3))
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    checkpoints: CheckpointConfig = field(
        default_factory=lambda: CheckpointConfig(keep=1, which="last")
    )

    def __post_init__(self) -> None:
        moving = self.model.coupling_epochs
        if moving is None:
            return
        if not self.model.reversible:
            raise ValueError(
                "--model.coupling-epochs moves to rewired connections, but --model.no-reversible "
                "says that there are none: leave one of them out."
            )
        if not 0 < moving <= self.epochs:
            raise ValueError(
                f"--model.coupling-epochs must be above 0 and at most the {self.epochs} epochs of "
                f"the run, not {moving:g}: the network would end between the two."
            )


def toy() -> ClassificationRecipe:
    """Finetunes the rewired toy backbone on toy clips: minutes on two CPU cores."""
    return ClassificationRecipe(
        name="toy",
        epochs=2,
        batch_size=8,
        data=TrimmedDataConfig(
            training=f"{TOY_TRIMMED}/training",
            validation=f"{TOY_TRIMMED}/validation",
            make_toy=True,
            size=64,
            clip=ClipConfig(frames=32, fps=12.0),
        ),
        model=ClassifierModelConfig(
            backbone=swin_toy(),
            weights=TOY_WEIGHTS,
            head=ClipClassifierConfig(dropout=0.0),
        ),
        optim=OptimConfig(
            backbone_lr=3e-4,
            localizer_lr=3e-3,
            warmup_epochs=0.1,
            ema=0.95,
            precision="float32",
        ),
        views=ViewConfig(clips=3),
        scale=ScaleConfig(workers=2, gpu=False, cpus_per_worker=0.5, max_failures=0),
    )


# What the papers of both backbones pretrain with, but for RandAugment, mixing and erasing.
_AUGMENTATION = AugmentationConfig(source_size=256, crop_area=(0.3, 1.0), flip=0.5)


def kinetics_re2_swin_t() -> ClassificationRecipe:
    """Kinetics with a rewired Swin-T: step 4 of Re2TAL; needs data, weights and GPUs.

    Clips of 32 frames at 15 a second, as every second frame of 30, tested on 4 clips and 3 crops
    (Liu et al., CVPR 2022). The learning rate of the backbone is a tenth of the head's, as there.
    """
    return ClassificationRecipe(
        name="kinetics_re2_swin_t",
        epochs=10,
        batch_size=8,
        data=TrimmedDataConfig(augmentation=_AUGMENTATION, max_failed=0.2),
        model=ClassifierModelConfig(backbone=replace(swin_t(), drop_path=0.1)),
        optim=OptimConfig(backbone_lr=1e-4, localizer_lr=1e-3, warmup_epochs=1.0, ema=0.999),
        scale=ScaleConfig(workers=8),
    )


def kinetics_re2_slowfast_101() -> ClassificationRecipe:
    """Kinetics with a rewired SlowFast-101: step 4 of Re2TAL; needs data, weights and GPUs.

    As `kinetics_re2_swin_t`, tested on 10 clips and 3 crops (Feichtenhofer et al., ICCV 2019).
    """
    recipe = kinetics_re2_swin_t()
    return replace(
        recipe,
        name="kinetics_re2_slowfast_101",
        model=replace(recipe.model, backbone=slowfast_101()),
        views=ViewConfig(clips=10, crops=3),
    )


RECIPES: dict[str, Callable[[], ClassificationRecipe]] = {
    recipe.__name__: recipe for recipe in (toy, kinetics_re2_swin_t, kinetics_re2_slowfast_101)
}
