"""Training on features equals training with a frozen backbone on the same windows."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config.recipe import Recipe
from pipelines.core.models import local_detector
from pipelines.data.batches import Batch
from pipelines.data.decoding import VideoJob, decode_video
from pipelines.data.feature_extraction import load_backbone, unit_features
from pipelines.data.feature_options import FrozenBackboneConfig
from pipelines.data.feature_stream import FeatureStream, without_backbone
from pipelines.data.feature_writing import FeatureFolder, FilesConfig
from pipelines.data.features import NAME, ExtractedVideo, Features, VideoEntry
from pipelines.data.inputs import detection_inputs
from pipelines.data.plan import Plan, make_plan
from pipelines.data.sampling import SamplingConfig
from pipelines.training.detection import DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.trainer import Trainer
from re2tal.backbones.precomputed import Precomputed, PrecomputedConfig
from re2tal.backbones.swin import TOY_WEIGHTS
from re2tal.datasets import load_annotations
from re2tal.errors import UserError
from re2tal.inference import detect
from re2tal.trained import load_detector
from re2tal.videos.augmentation import AugmentationConfig
from re2tal.videos.windows import WindowConfig, sliding_windows


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Recipe with a frozen backbone and windows of whole videos, which can be cut in one way."""
    return replace(
        tiny_recipe,
        epochs=2,
        batch_size=1,
        data=replace(tiny_recipe.data, window=WindowConfig(frames=256, fps=12.0)),
        model=replace(tiny_recipe.model, weights=TOY_WEIGHTS, tuning="frozen"),
        optim=replace(tiny_recipe.optim, precision="float32", warmup_epochs=0.5),
    )


@pytest.fixture(scope="module")
def folder(tiny_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the same windows, computed without Ray."""
    made = tmp_path_factory.mktemp("features")
    config = FrozenBackboneConfig(
        backbone="swin_toy", weights=TOY_WEIGHTS, reversible=True, size=32
    )
    backbone = load_backbone(config, stride=None)
    extractor = backbone.build(torch.device("cpu"))
    sampling = SamplingConfig(way="windows", fps=12.0, frames=256).resolved(
        temporal_stride=2, multiple=2
    )
    videos = (*tiny_plan.training, *tiny_plan.validation)
    files = FeatureFolder(
        str(made),
        FilesConfig(),
        [v.annotation.video_id for v in videos],
        settings=backbone.described(),
        sampling=sampling,
        channels=backbone.channels,
    )
    files.begin(retry_failed=False)
    for video in videos:
        video_id, duration = video.annotation.video_id, video.annotation.duration
        sampled = sampling.of(duration=duration, own_fps=1.0)
        job = VideoJob(video_id=video_id, uri=video.uri, sampled=sampled)
        (row,) = decode_video(
            {"video": job}, size=32, batch_size=4, threads=1, notes=str(made / "notes")
        )
        units = unit_features(
            extractor, row["frames"], row["starts"], valid=row["valid"], frames=256, clips=False,
            batch_size=4,
        )  # fmt: skip
        grid = sampled.grid
        entry = VideoEntry(
            file="", length=grid.num_features, fps=grid.fps, stride=grid.stride,
            offset=grid.offset, duration=duration,
        )  # fmt: skip
        features = sampled.joined(units)
        files.add(
            video_id, ExtractedVideo(entry=entry, subset="", source=video.uri, features=features)
        )
    files.write_description()
    return made


def on_features(recipe: Recipe, folder: Path) -> Recipe:
    data = replace(recipe.data, features=str(folder), videos=None)
    return without_backbone(replace(recipe, data=data), Features(str(folder)))


def plan_of(recipe: Recipe) -> Plan:
    return make_plan(recipe.data, load_annotations(Path(str(recipe.data.annotations))))


def trainer_of(recipe: Recipe, plan: Plan, folder: Path) -> tuple[Trainer, LocalRuntime]:
    runtime = LocalRuntime(recipe, plan, folder)
    weights = Path(recipe.model.weights) if recipe.model.weights else None
    task = DetectionTask(recipe=recipe, plan=plan)
    return Trainer(task, runtime, weights=weights, output=str(folder)), runtime


@pytest.mark.slow
def test_losses_are_those_of_the_frozen_backbone(
    recipe: Recipe, tiny_plan: Plan, folder: Path, tmp_path: Path
) -> None:
    end_to_end, history = trainer_of(recipe, tiny_plan, tmp_path / "frames")
    fewer = on_features(recipe, folder)
    plan = plan_of(fewer)
    assert plan.features is not None
    assert [v.annotation for v in plan.training] == [v.annotation for v in tiny_plan.training]
    from_features, other = trainer_of(fewer, plan, tmp_path / "features")
    assert isinstance(from_features.state.detector.backbone, Precomputed)
    # they begin alike, although making a backbone draws random numbers too
    first = from_features.state.detector.localizer.state_dict()
    for name, value in end_to_end.state.detector.localizer.state_dict().items():
        assert torch.equal(value, first[name]), name
    ended = end_to_end.run(), from_features.run()
    losses = [
        [metrics["train/loss"] for _, metrics in runtime.history if "train/loss" in metrics]
        for runtime in (history, other)
    ]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len({round(loss, 3) for loss in losses[0]}) > 3  # it does learn something
    assert ended[1]["val/mAP"] == pytest.approx(ended[0]["val/mAP"], abs=1e-3)
    trained = [
        dict(trainer.state.detector.localizer.named_parameters())
        for trainer in (end_to_end, from_features)
    ]
    for name, value in trained[0].items():
        assert torch.allclose(trained[1][name], value, atol=1e-4), name
    spec, detector = load_detector(tmp_path / "features" / "checkpoint" / "detector")
    assert spec.backbone == PrecomputedConfig(channels=128, temporal_stride=2)
    with pytest.raises(ValueError, match="was trained on features and has no backbone"):
        detect(tiny_plan.validation[0].uri, (spec, detector))
    saved = str(tmp_path / "features" / "checkpoint")
    with pytest.raises(UserError, match="checkpoint: This detector was trained on features"):
        local_detector(saved, tmp_path, tracking="", option="--model")


def test_only_the_backbone_and_what_needs_it_are_replaced(recipe: Recipe, folder: Path) -> None:
    in_time = AugmentationConfig(speed=(0.8, 1.25), reverse=0.5)  # it needs no frames
    data = replace(recipe.data, augmentation=replace(in_time, source_size=48, crop_area=(0.5, 1.0)))
    model = replace(
        recipe.model,
        tuning="full",
        frozen=("backbone.patch_embed", "localizer.stem"),
        norms="statistics",
    )
    fewer = on_features(replace(recipe, data=data, model=model), folder)
    assert fewer.model.backbone == PrecomputedConfig(channels=128, temporal_stride=2)
    assert fewer.model.frozen == ("localizer.stem",)
    assert (fewer.model.weights, fewer.model.reversible) == (None, False)
    assert fewer.data.augmentation == in_time
    restored = replace(
        fewer,
        model=replace(
            fewer.model, backbone=recipe.model.backbone, weights=TOY_WEIGHTS, reversible=True,
            tuning="frozen", frozen=recipe.model.frozen,
        ),
        data=replace(
            fewer.data, features=None, videos=recipe.data.videos, augmentation=AugmentationConfig()
        ),
    )  # fmt: skip
    assert restored == recipe


def batches_of(recipe: Recipe, plan: Plan, features: Features) -> list[Batch]:
    windows = [
        window
        for video in plan.training
        for window in sliding_windows(video.annotation, plan.classes, recipe.data.window, stride=2)
    ]
    return list(FeatureStream(features, plan.durations).batches(windows, batch_size=2))


def test_features_that_cannot_be_read_are_masked_and_told(
    recipe: Recipe, folder: Path, tmp_path: Path
) -> None:
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    fewer = on_features(recipe, tmp_path)
    plan = plan_of(fewer)
    features = Features(str(tmp_path))
    first, second = batches_of(fewer, plan, features)
    assert first.frames.dtype == torch.float32
    assert first.frames.shape == (2, 128, 128)
    assert not first.failures
    assert all(bool(mask.any()) for mask in (*first.mask, *second.mask))
    broken = plan.training[1].annotation.video_id
    np.save(tmp_path / f"{broken}.npy", np.zeros((5, 128), np.float32))
    first, _ = batches_of(fewer, plan, features)
    assert first.failures.keys() == {broken}
    assert "holds 5 features" in first.failures[broken]
    assert not first.mask[1].any()
    assert not first.frames[1].any()
    assert not len(first.targets[1].labels)


def test_videos_without_features_are_left_out(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "features")
    said = json.loads((copied / NAME).read_text())
    video_id, entry = said["videos"].popitem()
    said["failures"][video_id] = "was damaged"
    (copied / NAME).write_text(json.dumps(said))
    fewer = on_features(recipe, copied)
    with pytest.raises(UserError, match=f"(?s)1 of 5 videos.*{video_id}: was damaged"):
        plan_of(fewer)
    plan = plan_of(replace(fewer, data=replace(fewer.data, max_failed=0.5)))
    assert plan.failures == {video_id: "was damaged"}
    said["videos"][video_id] = {**entry, "fps": 0.73 * entry["fps"]}
    (copied / NAME).write_text(json.dumps(said))
    (remark,) = plan_of(fewer).remarks
    assert f"{video_id}: its features end at second" in remark
    said["videos"] = {f"v_{name}": place for name, place in said["videos"].items()}
    (copied / NAME).write_text(json.dumps(said))
    with pytest.raises(
        UserError, match=r"None of the 5 videos has features.* The ids there are v_"
    ):
        plan_of(fewer)


Change = Callable[[np.ndarray], np.ndarray | bytes]


def with_one(value: float) -> Change:
    """Return a function that puts a value into one place of an array."""

    def change(array: np.ndarray) -> np.ndarray:
        array[7, 3] = value
        return array

    return change


def as_others_write(folder: Path, target: Path, change: Change, **said: Any) -> list[str]:
    """Write changed copies of feature files that only a rule describes; return their names."""
    target.mkdir()
    for path in folder.glob("*.npy"):
        changed = change(np.load(path))
        if isinstance(changed, bytes):
            (target / path.name).write_bytes(changed)
        else:
            np.save(target / path.name, changed)
    description = {"format": "re2tal features 1", "layout": "npy", "clips": CLIPS, **said}
    (target / NAME).write_text(json.dumps(description))
    return sorted(path.name for path in target.glob("*.npy"))


HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 1000), }"
HUGE = b"\x93NUMPY\x01\x00" + (len(HEADER) + 1).to_bytes(2, "little") + HEADER + b"\n"
CLIPS = {"fps": 12.0, "stride": 2, "frames": 2}
SHAPE = r"must hold floating numbers of shape \(T, C\), but holds"


@pytest.mark.parametrize(
    ("change", "said", "reason"),
    [
        (with_one(np.nan), {}, "not finite .* in 1 of .* features, the first of them number 7"),
        (with_one(-np.inf), {"channels": 128}, "not finite"),
        (lambda a: with_one(np.inf)(a.astype(np.float16)), {}, "not finite"),  # too large for it
        (lambda a: a[:, :100], {"channels": 128}, r"has 100 channels where \S+json has 128\."),
        (lambda a: a.T, {"channels": 128}, r"where \S+json has 128; is it of shape \(C, T\)\?"),
        (lambda a: a.T, {}, r"has 8\d channels where \S+npy has 92; is it of shape \(C, T\)\?"),
        (lambda a: np.tile(a[:80].T, (2, 1)), {}, r"up to second 42.* is it of shape \(C, T\)\?"),
        (lambda a: a[: len(a) // 2], {}, r"features up to second [67]\.\d of a video of 1\d"),
        (lambda a: np.repeat(a, 2, axis=0), {}, r"features up to second \d+\.\d of a video of 1\d"),
        (lambda a: a[:0], {}, rf"{SHAPE} float32 of shape \(0, 128\)"),
        (lambda a: a[None], {}, rf"{SHAPE} float32 of shape \(1, "),
        (lambda a: a.astype(np.int8), {}, rf"{SHAPE} int8"),
        (lambda a: a.astype(str), {}, rf"{SHAPE} <U"),
        (lambda a: a.astype(object), {}, "cannot be read as an array: Object arrays"),
        (lambda a: a.tobytes(), {}, "cannot be read as an array"),
        (lambda _: b"", {}, "cannot be read as an array"),
        (lambda _: b"PK\3\4 no archive", {}, "cannot be read as an array"),
        (lambda _: HUGE, {}, "cannot be read as an array"),
        (lambda _: HUGE.replace(b")", b"("), {}, "cannot be read as an array"),
    ],
)
def test_features_that_cannot_be_used_are_named_before_training(
    recipe: Recipe, folder: Path, tmp_path: Path, change: Change, said: Any, reason: str
) -> None:
    names = as_others_write(folder, tmp_path / "features", change, **said)
    with pytest.raises(UserError, match=f"(?s){reason}") as caught:
        plan_of(on_features(recipe, tmp_path / "features"))
    assert str(tmp_path / "features" / names[0]) in str(caught.value)
    assert "--data.videos" not in str(caught.value)


@pytest.mark.parametrize(
    "clips",
    [{"fps": 0}, {"fps": -1}, {"fps": "x"}, {"stride": 0}, {"frames": 0}, {"stride": 10**30}],
)
def test_places_that_cannot_be_are_refused(
    recipe: Recipe, folder: Path, tmp_path: Path, clips: dict[str, Any]
) -> None:
    as_others_write(folder, tmp_path / "features", lambda a: a, clips={**CLIPS, **clips})
    with pytest.raises(
        UserError, match=r"features\.json does not have .* damaged: clips.*[^.]\. If"
    ):
        on_features(recipe, tmp_path / "features")


def test_one_damaged_file_in_many_is_left_out(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    names = as_others_write(folder, tmp_path / "features", lambda a: a)
    np.save(tmp_path / "features" / names[0], np.full((90, 128), np.nan))
    fewer = on_features(recipe, tmp_path / "features")
    with pytest.raises(UserError, match=r"1 of 5 videos cannot be used, more than .*max-failed"):
        plan_of(fewer)
    plan = plan_of(replace(fewer, data=replace(fewer.data, max_failed=0.2)))
    assert set(plan.failures) == {Path(names[0]).stem}
    assert len(plan.uris) == 4


def test_halves_are_features_as_well(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    as_others_write(folder, tmp_path / "halves", lambda a: a.astype(np.float16))
    as_others_write(folder, tmp_path / "doubles", lambda a: a.astype(np.float16).astype(float))
    found = []
    for kind in ("halves", "doubles"):
        fewer = on_features(recipe, tmp_path / kind)
        plan = plan_of(fewer)
        assert plan.failures == {}
        assert plan.features is not None
        found.append(batches_of(fewer, plan, plan.features))
    for half, double in zip(*found, strict=True):
        assert half.frames.dtype == torch.float32
        assert torch.allclose(half.frames, double.frames, rtol=1e-6, atol=0)
        assert half.frames.any()


def test_what_is_missing_is_one_sentence(recipe: Recipe, tmp_path: Path) -> None:
    data = replace(recipe.data, features="/nowhere", videos=None)
    with pytest.raises(UserError, match=r"nothing at /nowhere. Correct --data.features"):
        detection_inputs(replace(recipe, data=data))
    data = replace(recipe.data, features=str(tmp_path), videos=None)
    with pytest.raises(UserError, match=r"has no features.json"):
        plan_of(replace(recipe, data=data))
    assert detection_inputs(replace(recipe, data=data)).data.features == str(tmp_path)


def test_features_take_the_place_of_a_backbones() -> None:
    backbone = PrecomputedConfig(channels=3, temporal_stride=4).build()
    features = torch.randn(2, 5, 3)
    assert torch.equal(backbone(features), features.transpose(1, 2))
    with pytest.raises(ValueError, match="cannot see videos"):
        backbone(torch.zeros(2, 5, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must be \(B, T', 3\), but got \(2, 5, 4\)"):
        backbone(torch.randn(2, 5, 4))
    with pytest.raises(ValueError, match="channels must be 1 to"):
        PrecomputedConfig(channels=0, temporal_stride=4)
