"""Recipes of THUMOS-14, and of MultiTHUMOS, which labels the same videos."""

from dataclasses import replace

from pipelines.config.recipe import DataConfig, ModelConfig, OptimConfig, Recipe
from re2tal.backbones.slowfast import slowfast_101
from re2tal.backbones.swin import swin_t
from re2tal.backbones.videomae import (
    VideoMAEConfig,
    videomae_b,
    videomae_l,
    videomae_s,
    videomae_v2_g,
)
from re2tal.datasets import MULTITHUMOS
from re2tal.detection.suppression import NmsConfig
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.localizers.tridet import TriDetConfig
from re2tal.localizers.vsgn import VSGNConfig
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.stitching import StitchConfig
from re2tal.videos.windows import WindowConfig

# As in the authors' implementation, without RandAugment, which follows the flip there. Their crops
# are shares of the whole frame; ours are shares of the central square, which evaluation uses too.
AUGMENTATION = AugmentationConfig(
    source_size=256,
    crop_area=(0.08, 1.0),
    flip=0.5,
    brightness=0.5,
    contrast=0.5,
    saturation=0.5,
    hue=0.1,
)


def thumos_re2_swin_t_actionformer() -> Recipe:
    """THUMOS-14 with a reversible Swin-T and ActionFormer; needs data, weights and a GPU.

    1024 frames at 15 fps (every second frame of 30), 224 pixels, batch 2. The settings are those
    that the authors' implementation publishes for this pair: the first 120 epochs of a cosine
    schedule of 1500. Of its augmentation, RandAugment is left out. An epoch covers each whole
    video; theirs takes one random window of each.
    THUMOS trains on its validation set and evaluates on its test set; the usual ActivityNet-style
    file calls them training and validation. Of the 213 test videos 210 are used, as in VSGN's
    ground truth; wrongly annotated ones are left out. OpenTAD's published results are on 211
    (--data.keep video_test_0001496), ActionFormer's on 212 (also video_test_0000270).
    """
    return Recipe(
        name="thumos_re2_swin_t_actionformer",
        epochs=120,
        batch_size=2,
        data=DataConfig(
            dataset="thumos-14",
            window=WindowConfig(frames=1024, fps=15.0, sliding_overlap=0.5),
            augmentation=AUGMENTATION,
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

    As `thumos_re2_swin_t_actionformer`; this backbone also makes 512 features of a window.
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

    TriDet's settings are those that its authors publish for THUMOS-14 with I3D features, where the
    average mAP is 69.3 (Shi et al., CVPR 2023); OpenTAD reports 69.60. They initialize the filters
    of the SGP layers at zero, from which these learn nothing (--model.localizer.filter-start 0.1
    lets them learn). No settings are published for TriDet with a trained backbone. Frames, backbone
    and optimizer are those of ActionFormer's recipe: 120 epochs instead of 40, windows of 512
    features instead of 2304, and a weight decay of 0.05 instead of 0.025.
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

    VSGN's settings are those that its authors publish for THUMOS-14 on features (windows of 1280
    features there, 512 here), including self-stitching and a new window every quarter of one. As
    there, Gaussian soft-NMS runs over all classes of a video together. Differences: the authors
    first apply hard NMS (tIoU 0.4) to each class of each window, which we apply only between clip
    and copy in stitched windows (`re2tal.inference`); and they drop detections of 50 s and more.
    The paper pairs VSGN with these backbones but publishes no settings for the pair: frames,
    backbone and optimizer are those of ActionFormer's recipe.
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


def thumos_re2_videomae_s_actionformer() -> Recipe:
    """THUMOS-14 with a reversible VideoMAE-S and ActionFormer; needs data, weights and a GPU.

    768 frames at 7.5 fps (every fourth frame of 30), 160 pixels, batch 2, features interpolated to
    one a frame, the first 60 epochs of a cosine schedule of 100: these are the settings that
    AdaTAD's authors publish for this pair, with an average mAP of 69.03 on 211 videos (Liu et al.,
    CVPR 2024). They train adapters in a frozen backbone (--model.tuning adapters uses their
    learning rate). Here everything is trained, at the learning rate of their configuration for full
    finetuning, for which OpenTAD lists no result. Further differences: RandAugment and drop path
    (0.1) are left out, 210 videos are used, and an epoch covers each whole video, where theirs
    takes one random window of each. Weights: hf:MCG-NJU/videomae-small-finetuned-kinetics.
    """
    recipe = thumos_re2_swin_t_actionformer()
    return replace(
        recipe,
        name="thumos_re2_videomae_s_actionformer",
        epochs=60,
        data=replace(
            recipe.data,
            size=160,
            window=WindowConfig(frames=768, fps=7.5, sliding_overlap=0.5),
            augmentation=replace(AUGMENTATION, source_size=182),
        ),
        model=replace(recipe.model, backbone=videomae_s().with_stride(1)),
        optim=replace(recipe.optim, schedule_epochs=100, adapter_lr=2e-4),
    )


def thumos_re2_videomae_b_actionformer() -> Recipe:
    """THUMOS-14 with a reversible VideoMAE-B and ActionFormer; needs data, weights and a GPU.

    As `thumos_re2_videomae_s_actionformer`; AdaTAD's average mAP is 71.14. Weights:
    hf:MCG-NJU/videomae-base-finetuned-kinetics.
    """
    return _with_videomae("thumos_re2_videomae_b_actionformer", videomae_b())


def thumos_re2_videomae_l_actionformer() -> Recipe:
    """THUMOS-14 with a reversible VideoMAE-L and ActionFormer; needs data, weights and a GPU.

    As `thumos_re2_videomae_s_actionformer`; AdaTAD's average mAP is 73.51. Weights:
    hf:MCG-NJU/videomae-large-finetuned-kinetics.
    """
    return _with_videomae("thumos_re2_videomae_l_actionformer", videomae_l())


def _with_videomae(name: str, backbone: VideoMAEConfig) -> Recipe:
    """Put a larger VideoMAE into the recipe of VideoMAE-S."""
    recipe = thumos_re2_videomae_s_actionformer()
    return replace(
        recipe,
        name=name,
        model=replace(recipe.model, backbone=backbone.with_stride(1)),
        optim=replace(recipe.optim, adapter_lr=1e-4),
    )


def thumos_re2_videomae_v2_g_actionformer() -> Recipe:
    """THUMOS-14 with a reversible VideoMAE V2-g and ActionFormer; needs data, weights and a GPU.

    1536 frames at 15 fps, 224 pixels, batch 2, a feature every second frame, 50 epochs. AdaTAD's
    average mAP with these settings is 77.07, the highest that OpenTAD lists. The differences are
    those of `thumos_re2_videomae_s_actionformer`. The authors of VideoMAE V2 provide its weights,
    finetuned on Kinetics-710, on request (OpenGVLab/VideoMAEv2).
    """
    recipe = _with_videomae("thumos_re2_videomae_v2_g_actionformer", videomae_v2_g())
    return replace(
        recipe,
        epochs=50,
        data=replace(
            recipe.data,
            size=224,
            window=replace(recipe.data.window, frames=1536, fps=15.0),
            augmentation=AUGMENTATION,
        ),
        model=replace(recipe.model, backbone=videomae_v2_g().with_stride(2)),
    )


def multithumos_re2_videomae_s_actionformer() -> Recipe:
    """MultiTHUMOS with a reversible VideoMAE-S and ActionFormer; needs data, weights and a GPU.

    As `thumos_re2_videomae_s_actionformer`, with the settings that AdaTAD publishes for
    MultiTHUMOS: 80 epochs, up to 8000 detections a video, and three convolutions before the pyramid
    (instead of two convolutions and two transformer blocks). Its average mAP over tIoU 0.1 to 0.9
    is 40.77 (VideoMAE-B 42.76, -L 45.15); that of ActionFormer on I3D features is 39.19.
    """
    recipe = thumos_re2_videomae_s_actionformer()
    return replace(
        recipe,
        name="multithumos_re2_videomae_s_actionformer",
        epochs=80,
        thresholds=MULTITHUMOS.thresholds,
        data=replace(recipe.data, dataset=MULTITHUMOS.name),
        model=replace(
            recipe.model,
            localizer=ActionFormerConfig(window=0, embed_layers=3, stem_layers=0, top_k=8000),
        ),
        optim=replace(recipe.optim, adapter_lr=4e-4),
        nms=NmsConfig(sigma=0.5, top_k=8000),
    )
