"""Recipes of `train.py`: functions that return a complete, typed configuration of a run.

`train.py RECIPE` picks the function by its name; `--field.sub value` and a sweep override single
fields. Nothing else configures a run: no file inheritance, no globals.
"""

from collections.abc import Callable
from dataclasses import replace

from pipelines.config.recipe import DataConfig, ModelConfig, OptimConfig, Recipe, ScaleConfig
from re2tal.backbones.slowfast import slowfast_101
from re2tal.backbones.swin import TOY_WEIGHTS, swin_t, swin_toy
from re2tal.datasets import ACTIVITYNET13
from re2tal.detection.suppression import NmsConfig
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.localizers.tridet import TriDetConfig
from re2tal.localizers.vsgn import VSGNConfig
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.stitching import StitchConfig
from re2tal.videos.windows import WindowConfig

# As the authors' implementation publishes it, but for RandAugment, which follows the flip there.
# Their crops are shares of the whole frame, ours of the square in its middle, which is also what
# the evaluation sees.
_AUGMENTATION = AugmentationConfig(
    source_size=256,
    crop_area=(0.08, 1.0),
    flip=0.5,
    brightness=0.5,
    contrast=0.5,
    saturation=0.5,
    hue=0.1,
)


def toy() -> Recipe:
    """The toy data set and a small Swin pretrained on toy clips: minutes on two CPU cores."""
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
    """The toy data set with TriDet in the place of ActionFormer."""
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
    """The toy data set with VSGN in the place of ActionFormer.

    Without self-stitching: the toy actions fill a good part of a window as they are, and half of
    the time would go into clips (--data.window.stitch.enabled).
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


def thumos_re2_swin_t_actionformer() -> Recipe:
    """THUMOS-14 with a reversible Swin-T and ActionFormer; needs data, weights and a GPU.

    1024 frames at 15 fps (every second one of 30), 224 pixels, batch 2. The settings are those that
    the authors' implementation publishes for this pair: 120 epochs of a cosine laid out for 1500.
    Of its augmentation, RandAugment is left out, and an epoch shows all of a video where it takes
    one random window.
    THUMOS trains on its validation set and is evaluated on its test set; in the usual
    ActivityNet-style file of it these are called training and validation. Of its 213 test videos
    210 count, as in VSGN's ground truth: falsely annotated ones are left out. OpenTAD's published
    results are of 211 (--data.keep video_test_0001496), ActionFormer's of 212 (and
    video_test_0000270).
    """
    return Recipe(
        name="thumos_re2_swin_t_actionformer",
        epochs=120,
        batch_size=2,
        data=DataConfig(
            dataset="thumos-14",
            window=WindowConfig(frames=1024, fps=15.0, sliding_overlap=0.5),
            augmentation=_AUGMENTATION,
        ),
        model=ModelConfig(
            backbone=replace(swin_t(), drop_path=0.2),
            localizer=ActionFormerConfig(window=0),
        ),
        optim=OptimConfig(backbone_lr=1e-5, localizer_lr=1e-4, schedule_epochs=1500),
        nms=NmsConfig(sigma=0.7, top_k=2000),
    )


def thumos_re2_slowfast_101_actionformer() -> Recipe:
    """THUMOS-14 with a reversible SlowFast-101 and ActionFormer; needs data, weights and a GPU.

    As `thumos_re2_swin_t_actionformer`: this backbone too makes 512 features of a window.
    """
    recipe = thumos_re2_swin_t_actionformer()
    backbone = replace(slowfast_101(), temporal_stride=2)
    return replace(
        recipe,
        name="thumos_re2_slowfast_101_actionformer",
        model=replace(recipe.model, backbone=backbone),
    )


def thumos_re2_swin_t_tridet() -> Recipe:
    """THUMOS-14 with a reversible Swin-T and TriDet; needs data, weights and a GPU.

    TriDet's own settings are those that its authors publish for THUMOS-14, on I3D features, where
    the average mAP is 69.3 (Shi et al., CVPR 2023); OpenTAD gets 69.60 with it. Among them is a
    start of the SGP layers' filters at zero, from which they learn nothing
    (--model.localizer.filter-start 0.1 makes them learn). Nobody publishes the pair with a backbone
    that is trained: frames, backbone and optimiser are ActionFormer's, with 120 epochs in the place
    of 40, windows of 512 features in the place of 2304, and a weight decay of 0.05 in the place of
    0.025.
    """
    recipe = thumos_re2_swin_t_actionformer()
    return replace(
        recipe,
        name="thumos_re2_swin_t_tridet",
        model=replace(recipe.model, localizer=TriDetConfig(filter_start=0.0)),
        nms=NmsConfig(sigma=0.5, top_k=2000),
    )


def thumos_re2_swin_t_vsgn() -> Recipe:
    """THUMOS-14 with a reversible Swin-T and VSGN; needs data, weights and a GPU.

    VSGN's own settings are those that its authors publish for THUMOS-14 (on features; windows of
    1280 there, 512 here), self-stitching and windows every quarter included. As there, all classes
    of a video are thinned out together by Gaussian soft-NMS. What differs: they first thin out each
    class of each window by hard NMS (tIoU 0.4), where here that is done only between clip and copy
    of stitched windows (`re2tal.inference`); and they drop detections of 50 s and more. The paper
    pairs VSGN with these backbones but publishes no settings of the pair: frames, backbone and
    optimiser are ActionFormer's.
    """
    recipe = thumos_re2_swin_t_actionformer()
    stitch = StitchConfig(enabled=True)
    window = replace(recipe.data.window, sliding_overlap=0.75, stitch=stitch)
    return replace(
        recipe,
        name="thumos_re2_swin_t_vsgn",
        data=replace(recipe.data, window=window),
        model=replace(recipe.model, localizer=VSGNConfig()),
        nms=NmsConfig(sigma=0.46, top_k=200, per_class=False),
    )


def anet_re2_swin_t_actionformer() -> Recipe:
    """ActivityNet-1.3 with a reversible Swin-T and ActionFormer; needs data, weights and a GPU.

    Each video is resampled to 768 frames, 224 pixels, batch 8; 192 features. The settings are those
    that the authors' implementation publishes for this pair. It finds actions of whatever class,
    and their classes are the two best of an external video classifier: give its file as
    --data.video-scores (`re2tal.detection.video_scores` says in which form; the authors' results
    are with cuhk_val_simp_7.json). Of their augmentation, RandAugment is left out.
    """
    return Recipe(
        name="anet_re2_swin_t_actionformer",
        epochs=15,
        batch_size=8,
        thresholds=ACTIVITYNET13.thresholds,
        data=DataConfig(
            dataset="activitynet-1.3",
            window=WindowConfig(frames=768, fps=None),
            augmentation=_AUGMENTATION,
        ),
        model=ModelConfig(
            backbone=replace(swin_t(), drop_path=0.2, pooling=2),
            localizer=ActionFormerConfig(
                width=256,
                head_width=256,
                window=0,
                positions=192,
                label_smoothing=0.1,
                regression_weight=2.0,
                initial_normalizer=200.0,
            ),
            class_agnostic=True,
        ),
        optim=OptimConfig(backbone_lr=1e-5, localizer_lr=1e-3),
        nms=NmsConfig(sigma=0.7, top_k=100, per_class=False, voting="score", voting_iou=0.9),
    )


def anet_re2_slowfast_101_actionformer() -> Recipe:
    """ActivityNet-1.3 with a reversible SlowFast-101 and ActionFormer; needs data, weights, a GPU.

    As `anet_re2_swin_t_actionformer`.
    """
    recipe = anet_re2_swin_t_actionformer()
    return replace(
        recipe,
        name="anet_re2_slowfast_101_actionformer",
        model=replace(recipe.model, backbone=slowfast_101()),
    )


def anet_re2_swin_t_vsgn() -> Recipe:
    """ActivityNet-1.3 with a reversible Swin-T and VSGN; needs data, weights and a GPU.

    As `anet_re2_swin_t_actionformer`, with VSGN's settings for ActivityNet as OpenTAD publishes
    them: a stem at full rate, anchors of 3 and 7.5 node strides, 10 neighbours, matches from tIoU
    0.6 on. What differs: its classification loss there is focal, ours the authors' balanced cross
    entropy; 256 features of a video there, 192 here. A window holds the whole video, so nothing is
    stitched.
    """
    recipe = anet_re2_swin_t_actionformer()
    localizer = VSGNConfig(stem_stride=1, anchor_scales=(3.0, 7.5), neighbours=10, match_tiou=0.6)
    return replace(
        recipe,
        name="anet_re2_swin_t_vsgn",
        model=replace(recipe.model, localizer=localizer),
        optim=replace(recipe.optim, localizer_lr=1e-4),
        nms=NmsConfig(sigma=0.5, top_k=100, per_class=False),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        toy,
        toy_tridet,
        toy_vsgn,
        thumos_re2_swin_t_actionformer,
        thumos_re2_slowfast_101_actionformer,
        thumos_re2_swin_t_tridet,
        thumos_re2_swin_t_vsgn,
        anet_re2_swin_t_actionformer,
        anet_re2_slowfast_101_actionformer,
        anet_re2_swin_t_vsgn,
    )
}
