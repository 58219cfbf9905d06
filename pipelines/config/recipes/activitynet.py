"""Recipes of ActivityNet-1.3, and of HACS Segments and FineAction, which are trained similarly."""

from dataclasses import replace

from pipelines.config.recipe import DataConfig, ModelConfig, OptimConfig, Recipe
from pipelines.config.recipes.thumos import AUGMENTATION
from re2tal.backbones.slowfast import slowfast_101
from re2tal.backbones.swin import swin_t
from re2tal.backbones.videomae import videomae_b, videomae_l, videomae_s, videomae_v2_g
from re2tal.datasets import ACTIVITYNET13, FINEACTION, HACS_SEGMENTS
from re2tal.detection.suppression import NmsConfig
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.localizers.vsgn import VSGNConfig
from re2tal.videos.windows import WindowConfig

_ACTIONFORMER = ActionFormerConfig(
    width=256,
    head_width=256,
    window=0,
    positions=192,
    label_smoothing=0.1,
    regression_weight=2.0,
    initial_normalizer=200.0,
)


def anet_re2_swin_t_actionformer() -> Recipe:
    """ActivityNet-1.3 with a reversible Swin-T and ActionFormer; needs data, weights and a GPU.

    Each video is resampled to 768 frames of 224 pixels, which give 192 features; batch 8. The
    settings are those that the authors' implementation publishes for this pair. Detection is
    class-agnostic; the classes are the two best of an external video classifier, whose file is
    given as --data.video-scores (`re2tal.detection.video_scores` describes the format; the authors'
    results use cuhk_val_simp_7.json). Of the authors' augmentation, RandAugment is left out.
    """
    return Recipe(
        name="anet_re2_swin_t_actionformer",
        epochs=15,
        batch_size=8,
        thresholds=ACTIVITYNET13.thresholds,
        data=DataConfig(
            dataset="activitynet-1.3",
            window=WindowConfig(frames=768, fps=None),
            augmentation=AUGMENTATION,
        ),
        model=ModelConfig(
            backbone=replace(swin_t(), drop_path=0.2, pooling=2),
            localizer=_ACTIONFORMER,
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
    them: a stem at full rate, anchors of 3 and 7.5 node strides, 10 neighbours, positive anchors
    from tIoU 0.6 on. Differences: OpenTAD's classification loss is focal, ours is the VSGN authors'
    balanced cross entropy; OpenTAD has 256 features a video, we have 192. A window holds the whole
    video, so there is no self-stitching.
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


def anet_re2_videomae_s_actionformer() -> Recipe:
    """ActivityNet-1.3 with a reversible VideoMAE-S and ActionFormer; needs data, weights and a GPU.

    As `anet_re2_swin_t_actionformer`, with the settings that AdaTAD's authors publish for this
    pair: 160 pixels, batch 16. Their average mAP is 37.81 (Liu et al., CVPR 2024), with adapters in
    a frozen backbone (--model.tuning adapters --model.localizer.input-dropout 0). Here everything
    is trained, with the learning rate and the dropout of features (0.2) of their configuration for
    full finetuning, for which OpenTAD lists no result. Drop path (0.1) is left out.
    Weights: hf:MCG-NJU/videomae-small-finetuned-kinetics.
    """
    recipe = anet_re2_swin_t_actionformer()
    return replace(
        recipe,
        name="anet_re2_videomae_s_actionformer",
        batch_size=16,
        data=replace(recipe.data, size=160, augmentation=replace(AUGMENTATION, source_size=182)),
        model=replace(
            recipe.model,
            backbone=videomae_s().with_stride(4),
            localizer=replace(_ACTIONFORMER, input_dropout=0.2),
        ),
        optim=replace(recipe.optim, adapter_lr=1e-4),
    )


def anet_re2_videomae_b_actionformer() -> Recipe:
    """ActivityNet-1.3 with a reversible VideoMAE-B and ActionFormer; needs data, weights and a GPU.

    As `anet_re2_videomae_s_actionformer`; AdaTAD's average mAP is 38.35. Weights:
    hf:MCG-NJU/videomae-base-finetuned-kinetics.
    """
    recipe = anet_re2_videomae_s_actionformer()
    model = replace(recipe.model, backbone=videomae_b().with_stride(4))
    return replace(recipe, name="anet_re2_videomae_b_actionformer", model=model)


def anet_re2_videomae_l_actionformer() -> Recipe:
    """ActivityNet-1.3 with a reversible VideoMAE-L and ActionFormer; needs data, weights and a GPU.

    As `anet_re2_videomae_s_actionformer`; AdaTAD's average mAP is 39.21. Weights:
    hf:MCG-NJU/videomae-large-finetuned-kinetics.
    """
    recipe = anet_re2_videomae_s_actionformer()
    model = replace(recipe.model, backbone=videomae_l().with_stride(4))
    return replace(recipe, name="anet_re2_videomae_l_actionformer", model=model)


def anet_re2_videomae_v2_g_actionformer() -> Recipe:
    """ActivityNet-1.3 with a reversible VideoMAE V2-g and ActionFormer; needs data, weights, GPUs.

    As `anet_re2_videomae_s_actionformer`, with 224 pixels. AdaTAD's average mAP is 39.86, and 42.90
    with the classes of InternVideo2 (--data.video-scores). The authors of VideoMAE V2 provide its
    weights, finetuned on Kinetics-710, on request (OpenGVLab/VideoMAEv2).
    """
    recipe = anet_re2_videomae_s_actionformer()
    return replace(
        recipe,
        name="anet_re2_videomae_v2_g_actionformer",
        data=replace(recipe.data, size=224, augmentation=AUGMENTATION),
        model=replace(recipe.model, backbone=videomae_v2_g().with_stride(4)),
    )


def hacs_re2_videomae_s_actionformer() -> Recipe:
    """HACS Segments with a reversible VideoMAE-S and ActionFormer; needs data, weights and a GPU.

    No end-to-end settings are published for HACS. Frames and backbone are those of
    `anet_re2_videomae_s_actionformer`, resampled to 896 frames and 224 features, the number to
    which OpenTAD resizes features of HACS. Labels, losses and suppression are those of OpenTAD's
    ActionFormer on SlowFast features, which pads to 960 features and has an average mAP of 37.71
    (TriDet 38.47, DyFADet 39.45). Classes are the three best of an external classifier, whose file
    holds logits (--data.video-scores; OpenTAD uses TCANet's, validation94.32.json).
    """
    recipe = anet_re2_videomae_s_actionformer()
    return replace(
        recipe,
        name="hacs_re2_videomae_s_actionformer",
        thresholds=HACS_SEGMENTS.thresholds,
        data=replace(
            recipe.data,
            dataset=HACS_SEGMENTS.name,
            video_scores_top=3,
            video_scores_logits=True,
            window=WindowConfig(frames=896, fps=None),
        ),
        model=replace(
            recipe.model,
            localizer=replace(
                _ACTIONFORMER,
                input_dropout=0.1,
                positions=224,
                regression_weight=1.0,
                initial_normalizer=400.0,
            ),
        ),
        optim=replace(recipe.optim, weight_decay=0.03),
        nms=replace(recipe.nms, sigma=0.75, voting_iou=0.7),
    )


def fineaction_re2_videomae_s_actionformer() -> Recipe:
    """FineAction with a reversible VideoMAE-S and ActionFormer; needs data, weights and a GPU.

    No end-to-end settings are published for FineAction. Frames and backbone are those of
    `anet_re2_videomae_s_actionformer`. The localizer's settings are those of OpenTAD's ActionFormer
    on 192 features of VideoMAE-H, with an average mAP of 19.32 (with VideoMAE V2-g 19.62; DyFADet
    23.70). FineAction's actions are short, and 768 frames are few for a long video:
    --data.window.frames and --model.localizer.positions set more. Classes are the two best of an
    external classifier (--data.video-scores).
    """
    recipe = anet_re2_videomae_s_actionformer()
    return replace(
        recipe,
        name="fineaction_re2_videomae_s_actionformer",
        epochs=20,
        thresholds=FINEACTION.thresholds,
        data=replace(recipe.data, dataset=FINEACTION.name),
        model=replace(recipe.model, localizer=replace(_ACTIONFORMER, window=(7, 7, 7, 7, 7, 0))),
        nms=replace(recipe.nms, sigma=0.75),
    )
