"""Recipes can be built, and agree with the publications."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.config.recipes import RECIPES
from pipelines.data.plan import ACTION
from pipelines.train import parse
from pipelines.training.model import build_detector, reported_classes
from pipelines.training.run import check_model
from re2tal.detection import Detections
from re2tal.errors import UserError
from re2tal.localizers.actionformer import ActionFormerConfig
from re2tal.localizers.tridet import TriDetConfig
from re2tal.localizers.vsgn import VSGNConfig
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.stitching import StitchConfig

CLASSES = tuple(f"class {i}" for i in range(20))
# Features of a window in the authors' experiments, by the beginning of the recipe's name.
FEATURES = {
    "toy": 64,
    "thumos_re2_swin": 512,
    "thumos_re2_slowfast": 512,
    "thumos_re2_videomae": 768,
    "multithumos": 768,
    "anet": 192,
    "hacs": 224,
    "fineaction": 192,
    "epic100": 768,
    "ego4d": 2048,
}
AGNOSTIC = ("anet", "hacs", "fineaction")


@cache
def features_of(backbone: Any, frames: int, size: int) -> Tensor:
    """Return features of a window in shape only, on which the number of blocks has no influence."""
    shallow = replace(backbone, depths=(1,) * len(backbone.depths))
    with torch.device("meta"), torch.inference_mode():
        features: Tensor = shallow.build().eval()(torch.zeros(1, 3, frames, size, size))
    return features


@pytest.mark.parametrize("name", RECIPES)
def test_its_parts_fit_together(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    backbone: Any = recipe.model.backbone
    frames = recipe.data.window.frames
    _, channels, features = features_of(backbone, frames, recipe.data.size).shape
    assert [features] == [known for start, known in FEATURES.items() if name.startswith(start)]
    grid = recipe.data.window.grid(100.0, stride=frames // features)
    assert grid.num_features == features
    localizer: Any = recipe.model.localizer.build(channels, len(CLASSES)).eval()
    assert features % localizer.multiple == 0
    mask = torch.ones(1, features, dtype=torch.bool)
    with torch.inference_mode():  # any other number of features would be refused
        found = localizer(torch.zeros(1, channels, features), mask)
        with pytest.raises(ValueError, match=f"multiple of {localizer.multiple}"):
            localizer(torch.zeros(1, channels, features - 1), mask[:, 1:])
    assert isinstance(found[0], Detections)


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_measured_as_its_data_set_is(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.thresholds == recipe.data.record.thresholds
    assert (recipe.data.dataset is None) is name.startswith("toy")


def test_the_readme_lists_them_all() -> None:
    text = (Path(__file__).parents[2] / "pipelines" / "README.md").read_text()
    section = text.partition("\n## Recipes\n")[2].partition("\n## ")[0]
    listed = []
    for start, choices, end in re.findall(r"`(\w+?)(?:{([\w,]+)})?(\w*)`", section):
        listed += [f"{start}{choice}{end}" for choice in choices.split(",")]
    assert sorted(listed) == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_can_be_given_on_the_command_line(name: str) -> None:
    recipe = parse([name, "--epochs", "3", "--data.window.stitch.clip", "0.3"])
    assert recipe == replace(
        RECIPES[name](),
        epochs=3,
        data=replace(
            recipe.data,
            window=replace(
                RECIPES[name]().data.window,
                stitch=replace(RECIPES[name]().data.window.stitch, clip=0.3),
            ),
        ),
    )
    localizer = recipe.model.localizer
    field, value = ("levels", 3) if isinstance(localizer, VSGNConfig) else ("head_layers", 2)
    option = f"--model.localizer.{field.replace('_', '-')}"
    changed = parse([name, option, str(value)]).model.localizer
    assert changed == replace(localizer, **{field: value})  # type: ignore[type-var]


# Read in the authors' configurations: epochs, batch, learning rates of backbone and localizer,
# sigma, detections a video, minimum overlap of a vote, overlap of the windows that are searched.
PUBLISHED = {
    "thumos_re2_swin_t_actionformer": (120, 2, 1e-5, 1e-4, 0.7, 2000, None, 0.5),
    "thumos_re2_slowfast_101_actionformer": (120, 2, 1e-5, 1e-4, 0.7, 2000, None, 0.5),
    "anet_re2_swin_t_actionformer": (15, 8, 1e-5, 1e-3, 0.7, 100, 0.9, None),
    "anet_re2_slowfast_101_actionformer": (15, 8, 1e-5, 1e-3, 0.7, 100, 0.9, None),
    # None is published of TriDet with this backbone: what trains it is ActionFormer's.
    "thumos_re2_swin_t_tridet": (120, 2, 1e-5, 1e-4, 0.5, 2000, None, 0.5),
    # None is published of VSGN with these backbones: what trains them is ActionFormer's, but for
    # OpenTAD's learning rate on ActivityNet.
    "thumos_re2_swin_t_vsgn": (120, 2, 1e-5, 1e-4, 0.46, 200, None, 0.75),
    "anet_re2_swin_t_vsgn": (15, 8, 1e-5, 1e-4, 0.5, 100, None, None),
    # AdaTAD's, with the backbone's rate in its full finetuning.
    "thumos_re2_videomae_s_actionformer": (60, 2, 1e-5, 1e-4, 0.7, 2000, None, 0.5),
    "thumos_re2_videomae_b_actionformer": (60, 2, 1e-5, 1e-4, 0.7, 2000, None, 0.5),
    "thumos_re2_videomae_l_actionformer": (60, 2, 1e-5, 1e-4, 0.7, 2000, None, 0.5),
    "thumos_re2_videomae_v2_g_actionformer": (50, 2, 1e-5, 1e-4, 0.7, 2000, None, 0.5),
    "multithumos_re2_videomae_s_actionformer": (80, 2, 1e-5, 1e-4, 0.5, 8000, None, 0.5),
    "anet_re2_videomae_s_actionformer": (15, 16, 1e-5, 1e-3, 0.7, 100, 0.9, None),
    "anet_re2_videomae_b_actionformer": (15, 16, 1e-5, 1e-3, 0.7, 100, 0.9, None),
    "anet_re2_videomae_l_actionformer": (15, 16, 1e-5, 1e-3, 0.7, 100, 0.9, None),
    "anet_re2_videomae_v2_g_actionformer": (15, 16, 1e-5, 1e-3, 0.7, 100, 0.9, None),
    "epic100_re2_videomae_l_actionformer": (35, 2, 1e-5, 1e-4, 0.4, 2000, None, 0.5),
    "ego4d_re2_videomae_l_actionformer": (20, 2, 1e-5, 1e-4, 2.0, 2000, None, 0.0),
    # OpenTAD's on features, which no backbone follows.
    "hacs_re2_videomae_s_actionformer": (15, 16, 1e-5, 1e-3, 0.75, 100, 0.7, None),
    "fineaction_re2_videomae_s_actionformer": (20, 16, 1e-5, 1e-3, 0.75, 100, 0.9, None),
}


def test_each_recipe_of_a_published_data_set_has_its_numbers() -> None:
    assert PUBLISHED.keys() == {name for name in RECIPES if not name.startswith("toy")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_are_those_that_were_published(name: str) -> None:
    recipe = RECIPES[name]()
    nms = recipe.nms
    votes = nms.voting_iou if nms.voting == "score" else None
    assert PUBLISHED[name] == (
        recipe.epochs,
        recipe.batch_size,
        recipe.optim.backbone_lr,
        recipe.optim.localizer_lr,
        nms.sigma,
        nms.top_k,
        votes,
        recipe.data.window.sliding_overlap,
    )
    assert nms.method == "soft"
    # VSGN's authors suppress all classes of THUMOS together; ActivityNet has but one.
    assert nms.per_class is not (name.startswith(AGNOSTIC) or name.endswith("vsgn"))
    assert recipe.optim.weight_decay == (0.03 if name.startswith("hacs") else 0.05)
    assert recipe.optim.clip == 1.0
    assert recipe.optim.warmup_epochs == 5


# Read in AdaTAD's configurations: frames, their rate, pixels, short side before the crop, epochs of
# the cosine, least visible share of an action, learning rate of the adapters.
FRAMES = {
    "thumos_re2_videomae_s_actionformer": (768, 7.5, 160, 182, 100, 0.75, 2e-4),
    "thumos_re2_videomae_b_actionformer": (768, 7.5, 160, 182, 100, 0.75, 1e-4),
    "thumos_re2_videomae_l_actionformer": (768, 7.5, 160, 182, 100, 0.75, 1e-4),
    "thumos_re2_videomae_v2_g_actionformer": (1536, 15.0, 224, 256, 100, 0.75, 1e-4),
    "multithumos_re2_videomae_s_actionformer": (768, 7.5, 160, 182, 100, 0.75, 4e-4),
    "anet_re2_videomae_s_actionformer": (768, None, 160, 182, None, 0.75, 1e-4),
    "anet_re2_videomae_v2_g_actionformer": (768, None, 224, 256, None, 0.75, 1e-4),
    "epic100_re2_videomae_l_actionformer": (6144, 15.0, 160, 182, 250, 0.3, 8e-5),
    # 7200 frames there, whose features are padded to as many
    "ego4d_re2_videomae_l_actionformer": (8192, 15.0, 192, 220, 25, 0.3, 4e-4),
}


@pytest.mark.parametrize("name", FRAMES)
def test_the_frames_are_those_that_were_published(name: str) -> None:
    recipe = RECIPES[name]()
    window = recipe.data.window
    assert FRAMES[name] == (
        window.frames,
        window.fps,
        recipe.data.size,
        recipe.data.augmentation.source_size,
        recipe.optim.schedule_epochs,
        window.min_visible,
        recipe.optim.adapter_lr,
    )


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("thumos_re2_videomae_s_actionformer", {}),
        (
            "multithumos_re2_videomae_s_actionformer",
            {"embed_layers": 3, "stem_layers": 0, "top_k": 8000},
        ),
        (
            "epic100_re2_videomae_l_actionformer",
            {
                "window": 9,
                "input_dropout": 0.2,
                "overlapping_ranges": True,
                "label_smoothing": 0.1,
                "regression_weight": 0.5,
                "initial_normalizer": 250,
                "top_k": 5000,
            },
        ),
        (
            "ego4d_re2_videomae_l_actionformer",
            {
                "levels": 10,
                "window": (17, 17, 17, 17, 17, 17, 17, 0, 0, 0),
                "positions": 2048,
                "input_dropout": 0.2,
                "dropout": 0.1,
                "overlapping_ranges": True,
                "shortest_only": False,
                "top_k": 5000,
            },
        ),
    ],
)
def test_actionformer_is_as_adatad_and_opentad_published_it(
    name: str, published: dict[str, Any]
) -> None:
    wanted = replace(ActionFormerConfig(window=0), **published)
    assert RECIPES[name]().model.localizer == wanted


def test_actionformer_of_resampled_videos_is_as_opentad_published_it() -> None:
    """OpenTAD's settings for ActivityNet, and for HACS and FineAction on features."""
    anet = ActionFormerConfig(
        width=256,
        head_width=256,
        window=0,
        positions=192,
        label_smoothing=0.1,
        regression_weight=2.0,
        initial_normalizer=200.0,
    )
    hacs = RECIPES["hacs_re2_videomae_s_actionformer"]()
    assert hacs.model.localizer == replace(
        anet,
        input_dropout=0.1,
        positions=224,
        regression_weight=1.0,
        initial_normalizer=400.0,
    )
    assert (hacs.data.video_scores_top, hacs.data.video_scores_logits) == (3, True)
    fine = RECIPES["fineaction_re2_videomae_s_actionformer"]()
    assert fine.model.localizer == replace(anet, window=(7, 7, 7, 7, 7, 0))
    for size in "sbl":
        recipe = RECIPES[f"anet_re2_videomae_{size}_actionformer"]()
        assert recipe.model.localizer == replace(anet, input_dropout=0.2)
        assert (recipe.data.video_scores_top, recipe.data.video_scores_logits) == (2, False)
    assert RECIPES["anet_re2_swin_t_actionformer"]().model.localizer == anet


def test_verbs_are_asked_for_by_their_form() -> None:
    name = "epic100_re2_videomae_l_actionformer"
    assert RECIPES[name]().data.form == "epic-noun"
    verbs = parse([name, "--data.form", "epic-verb", "--model.localizer.label-smoothing", "0"])
    assert verbs.data == replace(RECIPES[name]().data, form="epic-verb")


def test_tridet_is_as_its_authors_published_it() -> None:
    assert RECIPES["thumos_re2_swin_t_tridet"]().model.localizer == TriDetConfig(
        width=512,
        embed_layers=2,
        stem_layers=2,
        levels=6,
        window=1,
        widening=5,
        mlp_width=768,
        filter_start=0,
        positions=0,
        input_noise=0.0005,
        drop_path=0.1,
        head_width=512,
        head_layers=3,
        bins=16,
        iou_power=0.2,
        first_range=4,
        centre_radius=1.5,
        prior=0.01,
        label_smoothing=0,
        regression_weight=1,
        initial_normalizer=100,
        score_threshold=0.001,
        top_k=2000,
        min_duration=0.05,
    )


def test_vsgn_is_as_its_authors_and_opentad_published_it() -> None:
    thumos, anet = RECIPES["thumos_re2_swin_t_vsgn"](), RECIPES["anet_re2_swin_t_vsgn"]()
    published = VSGNConfig(
        width=256,
        stem_stride=2,
        levels=5,
        neighbours=12,
        head_layers=4,
        anchor_scales=(1.0, 1.5),
        match_tiou=0.5,
        adjust_tiou=0.7,
        score_threshold=0.005,
    )
    assert thumos.model.localizer == published
    assert thumos.data.window.stitch == StitchConfig(
        enabled=True, short=0.4, clip=0.38, gap=30 / 1280
    )
    assert anet.model.localizer == replace(
        published, stem_stride=1, anchor_scales=(3.0, 7.5), neighbours=10, match_tiou=0.6
    )
    assert not anet.data.window.stitch.enabled


def test_published_settings_of_activitynet_and_its_kin_are_class_agnostic() -> None:
    for name, make in RECIPES.items():
        recipe = make()
        agnostic = name.startswith(AGNOSTIC)
        assert recipe.model.class_agnostic is agnostic
        assert reported_classes(recipe, CLASSES) == ((ACTION,) if agnostic else CLASSES)
        scored = replace(recipe, data=replace(recipe.data, video_scores="scores.json"))
        assert reported_classes(scored, CLASSES) == CLASSES


def test_external_scores_are_for_class_agnostic_models() -> None:
    recipe = RECIPES["toy"]()
    scored = replace(recipe, data=replace(recipe.data, video_scores="scores.json"))
    with pytest.raises(UserError, match=r"--model\.class-agnostic"):
        check_model(scored, CLASSES)


def test_a_class_agnostic_detector_has_one_class() -> None:
    recipe = RECIPES["toy_vsgn"]()
    agnostic = replace(recipe, model=replace(recipe.model, class_agnostic=True))
    assert build_detector(agnostic, CLASSES, weights=None).num_classes == 1
    assert build_detector(recipe, CLASSES, weights=None).num_classes == 20


def test_published_augmentation_is_that_of_the_data_sets_alone() -> None:
    for name, make in RECIPES.items():
        data = make().data
        if name.startswith("toy"):  # small figures, whose directions tell them apart
            assert data.augmentation == AugmentationConfig()
            continue
        assert data.augmentation == AugmentationConfig(
            source_size={224: 256, 192: 220, 160: 182}[data.size],
            crop_area=(0.08, 1.0),
            crop_aspect=(3 / 4, 4 / 3),
            flip=0.5,
            brightness=0.5,
            contrast=0.5,
            saturation=0.5,
            hue=0.1,
        )


def test_augmentation_can_be_given_on_the_command_line() -> None:
    options = ["--data.augmentation.flip", "0.25", "--data.augmentation.crop-area", "0.5", "1"]
    given = parse(["toy", *options]).data.augmentation
    assert given == AugmentationConfig(flip=0.25, crop_area=(0.5, 1.0))
    off = ["--data.augmentation.crop-area", "None"]
    assert parse(["thumos_re2_swin_t_actionformer", *off]).data.augmentation.crop_area is None


def test_stitched_windows_are_not_augmented_in_time() -> None:
    options = ["toy_vsgn", "--data.window.stitch.enabled", "--data.augmentation.flip", "0.5"]
    assert parse(options).data.window.stitch.enabled
    for given in (
        ["--data.augmentation.speed", "0.8", "1.2"],
        ["--data.augmentation.reverse", "1"],
    ):
        data = parse(["toy_vsgn", *given]).data
        stitch = replace(data.window.stitch, enabled=True)
        with pytest.raises(ValueError, match="shows clips at two rates: leave"):
            replace(data, window=replace(data.window, stitch=stitch))


def test_crops_are_not_taken_from_frames_that_are_too_small() -> None:
    data = RECIPES["anet_re2_swin_t_actionformer"]().data
    with pytest.raises(ValueError, match="source_size of 256 pixels is below"):
        replace(data, size=320)
