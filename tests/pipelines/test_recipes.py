"""What the recipes describe can be built, and is what was published."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipelines.config.recipes import RECIPES
from pipelines.data.plan import ACTION
from pipelines.train import parse
from pipelines.training.model import build_detector, reported_classes
from pipelines.training.run import check_model
from re2tal.detection import Detections
from re2tal.errors import UserError
from re2tal.localizers.tridet import TriDetConfig
from re2tal.localizers.vsgn import VSGNConfig
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.stitching import StitchConfig

CLASSES = tuple(f"class {i}" for i in range(20))
FEATURES = {"thumos": 512, "anet": 192}  # of a window, in the authors' experiments


@pytest.mark.parametrize("name", RECIPES)
def test_its_parts_fit_together(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    with torch.device("meta"):
        backbone: Any = recipe.model.backbone.build()
    features = recipe.data.window.grid(100.0, stride=backbone.temporal_stride).num_features
    assert features == FEATURES.get(name.split("_")[0], 64)
    localizer: Any = recipe.model.localizer.build(backbone.channels, len(CLASSES)).eval()
    assert features % localizer.multiple == 0
    mask = torch.ones(1, features, dtype=torch.bool)
    with torch.inference_mode():  # any other number of features would be refused
        found = localizer(torch.zeros(1, backbone.channels, features), mask)
        with pytest.raises(ValueError, match=f"multiple of {localizer.multiple}"):
            localizer(torch.zeros(1, backbone.channels, features - 1), mask[:, 1:])
    assert isinstance(found[0], Detections)


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
}


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
    assert nms.per_class is (name.startswith("thumos") and not name.endswith("vsgn"))
    assert recipe.optim.weight_decay == 0.05
    assert recipe.optim.clip == 1.0
    assert recipe.optim.warmup_epochs == 5


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


def test_published_settings_of_activitynet_are_class_agnostic() -> None:
    for name, make in RECIPES.items():
        recipe = make()
        agnostic = name.startswith("anet")
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
            source_size=256,
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


def test_crops_are_not_taken_from_frames_that_are_too_small() -> None:
    data = RECIPES["anet_re2_swin_t_actionformer"]().data
    with pytest.raises(ValueError, match="source_size of 256 pixels is below"):
        replace(data, size=320)
