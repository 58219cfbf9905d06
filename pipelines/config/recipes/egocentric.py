"""Recipes of long egocentric videos: EPIC-Kitchens-100 and Ego4D's Moment Queries."""

from dataclasses import replace

from pipelines.config.recipe import Recipe
from pipelines.config.recipes.thumos import AUGMENTATION, thumos_re2_videomae_l_actionformer
from re2tal.backbones.videomae import videomae_l
from re2tal.datasets import EGO4D_MQ, EPIC_KITCHENS100
from re2tal.detection.suppression import NmsConfig
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.videos.windows import WindowConfig


def epic100_re2_videomae_l_actionformer() -> Recipe:
    """EPIC-Kitchens-100 with a reversible VideoMAE-L and ActionFormer; needs data, weights, GPUs.

    Nouns; for verbs give --data.form epic-verb --model.localizer.label-smoothing 0. 6144 frames at
    15 fps, 160 pixels, batch 2, 768 features, the first 35 epochs of a cosine schedule of 250:
    these are the settings of AdaTAD, whose average mAP is 29.44 (nouns) and 29.69 (verbs), with
    adapters in a frozen backbone that was finetuned on EPIC's nouns or verbs (--model.tuning
    adapters). Differences: here everything is trained, at 1e-5 (their adapters at 8e-5); a feature
    is the mean of four, theirs that of the middle two of four; RandAugment and drop path are left
    out; and an epoch covers each whole video.
    """
    recipe = thumos_re2_videomae_l_actionformer()
    return replace(
        recipe,
        name="epic100_re2_videomae_l_actionformer",
        epochs=35,
        thresholds=EPIC_KITCHENS100.thresholds,
        data=replace(
            recipe.data,
            dataset=EPIC_KITCHENS100.name,
            form="epic-noun",
            window=WindowConfig(frames=6144, fps=15.0, sliding_overlap=0.5, min_visible=0.3),
        ),
        model=replace(
            recipe.model,
            backbone=videomae_l().with_stride(8),
            localizer=ActionFormerConfig(
                window=9,
                input_dropout=0.2,
                overlapping_ranges=True,
                label_smoothing=0.1,
                regression_weight=0.5,
                initial_normalizer=250.0,
                top_k=5000,
            ),
        ),
        optim=replace(recipe.optim, schedule_epochs=250, adapter_lr=8e-5),
        nms=NmsConfig(sigma=0.4, top_k=2000),
    )


def ego4d_re2_videomae_l_actionformer() -> Recipe:
    """Ego4D-MQ with a reversible VideoMAE-L and ActionFormer; needs data, weights and GPUs.

    A window holds a whole clip of eight minutes: 8192 frames at 15 fps, 192 pixels, 2048 features.
    AdaTAD's window has 7200 frames, whose 1800 features are padded to 2048. Its average mAP is
    28.41, with adapters in the last half of InternVideo's VideoMAE-L, finetuned on Ego4D's verbs
    and moments; ActionFormer on features of that backbone has 27.52. Differences: here everything
    is trained, at 1e-5 (their adapters at 4e-4); RandAugment and drop path are left out.
    """
    recipe = thumos_re2_videomae_l_actionformer()
    return replace(
        recipe,
        name="ego4d_re2_videomae_l_actionformer",
        epochs=20,
        thresholds=EGO4D_MQ.thresholds,
        data=replace(
            recipe.data,
            dataset=EGO4D_MQ.name,
            size=192,
            window=WindowConfig(frames=8192, fps=15.0, sliding_overlap=0.0, min_visible=0.3),
            augmentation=replace(AUGMENTATION, source_size=220),
        ),
        model=replace(
            recipe.model,
            backbone=videomae_l().with_stride(4),
            localizer=ActionFormerConfig(
                levels=10,
                window=(17,) * 7 + (0,) * 3,
                positions=2048,
                input_dropout=0.2,
                dropout=0.1,
                overlapping_ranges=True,
                shortest_only=False,
                top_k=5000,
            ),
        ),
        optim=replace(recipe.optim, schedule_epochs=25, adapter_lr=4e-4),
        nms=NmsConfig(sigma=2.0, top_k=2000),
    )
