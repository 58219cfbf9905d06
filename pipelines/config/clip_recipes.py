"""Recipes of `finetune_backbone.py`: functions that return a run's configuration."""

from collections.abc import Callable
from dataclasses import fields, replace

from pipelines.config.annotations import AnnotationConfig
from pipelines.config.recipe import (
    BackboneModelConfig,
    ClassificationRecipe,
    ClassifierModelConfig,
    OptimConfig,
    Recipe,
    ScaleConfig,
    TrimmedDataConfig,
)
from re2tal.backbones.slowfast import slowfast_101
from re2tal.backbones.swin import TOY_WEIGHTS, swin_t, swin_toy
from re2tal.classifier import ClipClassifierConfig
from re2tal.datasets.trimmed import ClipConfig, ViewConfig
from re2tal.videos.augmentation import AugmentationConfig

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
