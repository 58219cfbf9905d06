"""Recipes of the toy data set: minutes on two CPU cores, with weights that the repository ships."""

from dataclasses import replace

from pipelines.config.recipe import DataConfig, ModelConfig, OptimConfig, Recipe, ScaleConfig
from re2tal.backbones.swin import TOY_WEIGHTS, swin_toy
from re2tal.backbones.videomae import VIDEOMAE_TOY_WEIGHTS, videomae_toy
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.localizers.tridet import TriDetConfig
from re2tal.localizers.vsgn import VSGNConfig
from re2tal.videos.windows import WindowConfig


def toy() -> Recipe:
    """Toy data set and a small Swin pretrained on toy clips: minutes on two CPU cores."""
    return Recipe(
        name="toy",
        epochs=4,
        batch_size=2,
        data=DataConfig(
            annotations="data/toy/annotations.json",
            videos="data/toy/videos",
            make_toy=True,
            size=64,
            window=WindowConfig(frames=128, fps=12.0),
        ),
        model=ModelConfig(
            backbone=swin_toy(),
            weights=TOY_WEIGHTS,
            localizer=ActionFormerConfig(
                width=96,
                stem_layers=1,
                levels=5,
                window=9,
                head_width=96,
                drop_path=0.0,
                first_range=6.0,
                initial_normalizer=20.0,
            ),
        ),
        optim=OptimConfig(
            backbone_lr=3e-4,
            localizer_lr=1e-3,
            warmup_epochs=0.5,
            ema=0.98,
            precision="float32",
        ),
        scale=ScaleConfig(workers=2, gpu=False, cpus_per_worker=0.5),
    )


def toy_tridet() -> Recipe:
    """Toy data set with TriDet instead of ActionFormer."""
    recipe = toy()
    return replace(
        recipe,
        name="toy_tridet",
        model=replace(
            recipe.model,
            localizer=TriDetConfig(
                width=96,
                stem_layers=1,
                levels=5,
                window=3,
                widening=1.5,
                mlp_width=192,
                input_noise=0.0,
                head_width=96,
                drop_path=0.0,
                bins=8,
                first_range=6.0,
                initial_normalizer=20.0,
            ),
        ),
    )


def toy_vsgn() -> Recipe:
    """Toy data set with VSGN instead of ActionFormer.

    Without self-stitching (--data.window.stitch.enabled): toy actions fill much of a window
    anyway, and clips would take half of the time.
    """
    recipe = toy()
    return replace(
        recipe,
        name="toy_vsgn",
        epochs=5,
        model=replace(
            recipe.model,
            localizer=VSGNConfig(
                width=96,
                levels=4,
                stem_stride=1,
                head_layers=2,
                neighbours=6,
                anchor_scales=(2.0, 3.0),
            ),
        ),
        optim=replace(recipe.optim, localizer_lr=5e-4),
    )


def toy_videomae() -> Recipe:
    """Toy data set with a small VideoMAE, pretrained on toy clips, instead of the Swin.

    A window is eight clips of 16 frames, and a feature spans two frames, as with the Swin.
    """
    recipe = toy()
    model = replace(recipe.model, backbone=videomae_toy(), weights=VIDEOMAE_TOY_WEIGHTS)
    return replace(recipe, name="toy_videomae", model=model)
