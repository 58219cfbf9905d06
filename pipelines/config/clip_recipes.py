"""Recipes of `finetune_backbone.py`: their typed configuration, and functions that return it."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import PurePath
from typing import TypeAlias

from pipelines.config.annotations import AnnotationConfig
from pipelines.config.recipe import (
    BackboneModelConfig,
    CheckpointConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    ScaleConfig,
    check_frames,
)
from re2tal.backbones.slowfast import slowfast_101
from re2tal.backbones.swin import TOY_WEIGHTS, swin_t, swin_toy
from re2tal.classifier import ClipClassifierConfig
from re2tal.datasets.trimmed import ClipConfig, ViewConfig
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.windows import WindowConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimmedDataConfig(AnnotationConfig):
    """Trimmed videos, and the clips that are cut from them.

    With `annotations`, the clips are cut from the annotated segments of untrimmed videos, and the
    lists in `training` and `validation` are not read.

    Attributes:
        training: a folder with one subfolder of videos for each class, or a list of videos:
            Kinetics' own CSV, a CSV with `path` and `label`, or lines of `path label` (described in
            `re2tal.datasets.trimmed.lists`); a path or a URI.
        validation: folder or list, as above, of the videos for evaluation after every epoch.
        videos: folder that contains the paths in lists; or folder of the untrimmed videos, named by
            id; a path or a URI.
        training_subset: subset of the annotations for training; by default that of the data set, or
            "training".
        validation_subset: subset for evaluation; by default that of the data set, or "validation".
        background: add a class "background" of stretches between the annotated segments, as many
            as the most frequent class has segments.
        classes: file with the names of all classes, one a line; needed if lists have class numbers.
            By default the classes of the training videos, sorted.
        training_split: use only rows of the training list with this value in the column `split`;
            None uses all rows.
        validation_split: use only rows of the validation list with this value, likewise.
        make_toy: make the toy data set's trimmed split when there is nothing at `training`.
        size: pixels of a frame's side: the short side is resized to it.
        clip: frames of a clip and their rate.
        augmentation: random changes of training clips.
        max_failed: share of unusable videos above which the run stops. Kinetics always lacks some.

    Raises:
        ValueError: crops would be taken from frames smaller than `size`.
    """

    training: str | None = None
    validation: str | None = None
    videos: str | None = None
    training_subset: str | None = None
    validation_subset: str | None = None
    background: bool = False
    classes: str | None = None
    training_split: str | None = None
    validation_split: str | None = None
    make_toy: bool = False
    size: int = 224
    clip: ClipConfig = field(default_factory=ClipConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    max_failed: float = 0.05

    def __post_init__(self) -> None:
        check_frames(self, self.augmentation, self.size)

    @property
    def subsets(self) -> dict[str, str]:
        """Names of the data that a run trains on and is evaluated on."""
        if self.annotations is not None:
            named = {"training": self.trained_on, "validation": self.evaluated_on}
            return {use: f"{self.title} {name} segments" for use, name in named.items()}
        lists = {"training": self.training, "validation": self.validation}
        paths = {use: PurePath(path or "") for use, path in lists.items()}
        return {use: f"{path.parent.name} {path.stem}".strip() for use, path in paths.items()}

    @property
    def counted(self) -> str:
        """Name of the things that have a class each."""
        return "videos" if self.annotations is None else "segments"

    @property
    def trained_on(self) -> str:
        """Name of the training subset of the annotations."""
        return self.training_subset or self.record.training

    @property
    def evaluated_on(self) -> str:
        """Name of the validation subset of the annotations."""
        return self.validation_subset or self.record.validation

    @property
    def window(self) -> WindowConfig:
        """Windows that a classifier cuts from videos longer than a clip."""
        return WindowConfig(frames=self.clip.frames, fps=self.clip.fps)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierModelConfig(BackboneModelConfig):
    """Classifier: backbone and a linear layer. Without `reversible`, this is plain pretraining.

    Attributes:
        head: network that turns features into classes.
    """

    head: ClipClassifierConfig = field(default_factory=ClipClassifierConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationRecipe(RunConfig):
    """Complete configuration of one run of `finetune_backbone.py`.

    An epoch shows one clip of each training video. `optim.localizer_lr` is the learning rate of the
    classifier's head. The result is that of the last epoch, whatever checkpoints are kept.

    Attributes:
        data: trimmed videos and clips.
        model: backbone and classifying head.
        views: views whose scores the last evaluation averages; the evaluations after every epoch
            use only the middle clip.
        weights_file: path of an additional copy of the backbone's weights; an existing file is
            replaced.

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
        if self.model.added:
            raise ValueError(
                f"--model.tuning {self.model.tuning} is for train.py: here the result is the "
                "backbone's own weights. Use full, or frozen to train the classifier alone."
            )


AnyRecipe: TypeAlias = Recipe | ClassificationRecipe


TOY_TRIMMED = "data/toy_trimmed"


def toy() -> ClassificationRecipe:
    """Toy clips and the rewired toy backbone: minutes on two CPU cores."""
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


# The augmentation of both backbones' papers, except RandAugment, mixing and erasing.
_AUGMENTATION = AugmentationConfig(source_size=256, crop_area=(0.3, 1.0), flip=0.5)


def kinetics_re2_swin_t() -> ClassificationRecipe:
    """Kinetics with a rewired Swin-T: step 4 of Re2TAL; needs data, weights and GPUs.

    Clips of 32 frames at 15 fps (every second frame of 30), tested on 4 clips and 3 crops (Liu et
    al., CVPR 2022). As in that paper, the backbone's learning rate is a tenth of the head's.
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


def finetuning(recipe: Recipe) -> ClassificationRecipe:
    """Make the recipe of the finetuning that a detector's recipe begins with.

    A step has as many frames as the detector's, in shorter clips. If the connections move gradually
    to the rewired ones (`model.coupling_epochs`), they move in this finetuning. The whole backbone
    is trained, whatever part of it is trained afterwards (`model.tuning`).

    Raises:
        ValueError: the connections would not reach their end.
    """
    data, model, settings = recipe.data, recipe.model, recipe.finetune
    kept = {one.name for one in fields(BackboneModelConfig)} - {"tuning", "adapters", "lora"}
    shared = {one.name for one in fields(AnnotationConfig)}
    shared |= {"videos", "training_subset", "validation_subset", "size", "augmentation"}
    return ClassificationRecipe(
        name=f"{recipe.name}_finetuning",
        experiment=recipe.experiment,
        output=recipe.output,
        seed=recipe.seed,
        epochs=settings.epochs,
        batch_size=max(1, recipe.batch_size * data.window.frames // settings.frames),
        resume=recipe.resume,
        data=TrimmedDataConfig(
            **{name: getattr(data, name) for name in shared},
            background=settings.background,
            clip=ClipConfig(frames=settings.frames, fps=data.window.fps or ClipConfig().fps),
            max_failed=data.max_failed,
        ),
        model=ClassifierModelConfig(**{name: getattr(model, name) for name in kept}),
        optim=replace(
            recipe.optim,
            backbone_lr=settings.lr,
            localizer_lr=float(f"{10 * settings.lr:.6g}"),
            warmup_epochs=0.1 * settings.epochs,
            schedule_epochs=None,
        ),
        scale=recipe.scale,
        views=ViewConfig(clips=3),
    )


RECIPES: dict[str, Callable[[], ClassificationRecipe]] = {
    recipe.__name__: recipe for recipe in (toy, kinetics_re2_swin_t, kinetics_re2_slowfast_101)
}
