"""Training loop alone, in one process: it learns, resumes, and stops on a non-finite loss."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from pipelines.config.recipe import Recipe
from pipelines.core.metric_names import UNSCORED
from pipelines.data.batches import Batch, Video
from pipelines.data.plan import Plan
from pipelines.training.checkpoints import DETECTOR_FOLDER
from pipelines.training.detection import DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.stepper import NonFiniteLossError
from pipelines.training.trainer import Trainer
from re2tal.backbones.videomae import videomae_toy
from re2tal.errors import UserError
from re2tal.reversible import reversible_stages
from re2tal.trained import load_detector
from re2tal.videos.augmentation import AugmentationConfig, augment, clip_seed
from re2tal.videos.windows import Window


def _trainer(recipe: Recipe, plan: Plan, folder: Path) -> tuple[Trainer, LocalRuntime]:
    runtime = LocalRuntime(recipe, plan, folder)
    return Trainer(
        DetectionTask(recipe=recipe, plan=plan),
        runtime,
        weights=None,
        output=str(folder / "output"),
    ), runtime


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.state.detector.state_dict().items()}


def test_a_run_logs_what_it_promises(tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path) -> None:
    trainer, runtime = _trainer(tiny_recipe, tiny_plan, tmp_path)
    final = trainer.run()
    steps = [m for _, m in runtime.history if "train/loss" in m]
    assert len(steps) == trainer.state.step > 0
    for name in (
        "train/loss/classification",
        "train/loss/regression",
        "train/gradient_norm",
        "train/frames_per_second",
        "train/data_wait_share",
        "lr/backbone_decayed",
        "lr/localizer_decayed",
    ):
        assert all(math.isfinite(m[name]) for m in steps), name
    assert all(0 <= m["train/data_wait_share"] <= 1 for m in steps)
    assert any(name.startswith("memory/") for name in steps[-1])
    assert runtime.history[-1][1]["reversible/stages_stored"] == 0
    errors = {k: v for k, v in runtime.history[-1][1].items() if k.startswith("reversible/error/")}
    assert errors
    assert all(re.fullmatch(r"[\w./ -]+", name, re.ASCII) for name in errors)  # MLflow's rule
    assert not any(errors.values())  # the streams are exact
    expected = {f"val/mAP/tiou_{t:.2f}" for t in tiny_recipe.thresholds}
    assert expected <= final.keys()
    assert 0 <= final["val/mAP"] <= 1
    assert any("loss" in line and "frames/s" in line for line in runtime.lines)
    assert math.isfinite(final["val/loss"])
    assert 0 <= final["train/mAP"] <= 1
    assert any("on training videos" in line for line in runtime.lines)
    # the videos that are watched change nothing else, nor do they have to be
    drawn = torch.random.get_rng_state()
    alone, _ = _trainer(replace(tiny_recipe, watched_videos=0), tiny_plan, tmp_path / "alone")
    without = alone.run()
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert without == {k: v for k, v in final.items() if k not in ("val/loss", "train/mAP")}
    for name, value in _weights(trainer).items():
        assert torch.equal(value, _weights(alone)[name]), name


def test_connections_move_from_the_pretrained_ones_and_end_rewired(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    model = replace(tiny_recipe.model, coupling_epochs=0.5)
    trainer, runtime = _trainer(replace(tiny_recipe, model=model), tiny_plan, tmp_path)
    trainer.run()
    betas = [m["coupling/beta"] for _, m in runtime.history if "coupling/beta" in m]
    assert betas[0] == 0
    assert betas[-1] == 1
    assert betas == sorted(betas)
    # what is evaluated and saved is the rewired network
    for detector in (trainer.state.detector, trainer.state.averaged()):
        couplings = [stage.settings.coupling for _, stage in reversible_stages(detector)]
        assert {(coupling.alpha, coupling.beta) for coupling in couplings} == {(0.0, 1.0)}


def test_a_slice_budget_changes_how_stages_run_and_not_what_comes_out(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    weights = []
    for mb in (None, 1):
        model = replace(tiny_recipe.model, slice_mb=mb)
        recipe = replace(tiny_recipe, model=model)
        trainer, _ = _trainer(recipe, tiny_plan, tmp_path / str(mb))
        budgets = {s.settings.slice_bytes for _, s in reversible_stages(trainer.state.detector)}
        assert budgets == {"auto" if mb is None else 2**20}
        trainer.run()
        weights.append(_weights(trainer))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)


_ADDED = {"adapters": ".adapter.", "lora": ".lora_"}


@pytest.mark.parametrize("tuning", ["full", "adapters", "lora", "frozen"])
def test_what_the_tuning_names_is_trained_and_nothing_else(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path, tuning: Any
) -> None:
    chosen: dict[str, Any] = {"backbone": replace(videomae_toy(), channels=32, depths=(2,))}
    if tuning in _ADDED:  # the connections move too
        chosen["coupling_epochs"] = 0.5
    model = replace(tiny_recipe.model, tuning=tuning, **chosen)
    trainer, runtime = _trainer(replace(tiny_recipe, model=model), tiny_plan, tmp_path)
    before = _weights(trainer)
    trainer.run()
    moved = {n for n, v in _weights(trainer).items() if not torch.equal(v, before[n])}
    assert any(name.startswith("localizer.") for name in moved)
    of_backbone = {name for name in moved if name.startswith("backbone.")}
    if tuning == "full":
        assert of_backbone
    else:
        wanted = {name for name in before if tuning in _ADDED and _ADDED[tuning] in name}
        assert of_backbone == wanted
    # counted and shown
    history = {name: value for _, values in runtime.history for name, value in values.items()}
    sizes = {n: p.numel() for n, p in trainer.state.detector.named_parameters() if p.requires_grad}
    assert history["parameters/trained"] == sum(sizes.values()) <= history["parameters/total"]
    assert f"training {sum(sizes.values()):,} of " in runtime.lines[0]
    rates = {name for name in history if name.startswith("lr/") and "localizer" not in name}
    kind = {"full": "backbone", "frozen": None}.get(tuning, "adapters")
    assert all(kind and name.startswith(f"lr/{kind}_") for name in rates)
    # kept: the moving average in the checkpoint is a detector by itself
    with trainer.runtime.checkpoints()[0] as folder:
        _, loaded = load_detector(folder / DETECTOR_FOLDER)
    state = trainer.state.averaged().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.slow
def test_a_run_that_goes_on_ends_like_one_that_was_not_interrupted(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    dropping = replace(tiny_recipe.model.localizer, drop_path=0.2)  # type: ignore[type-var]
    two = replace(
        tiny_recipe,
        epochs=2,
        model=replace(tiny_recipe.model, localizer=dropping),
        optim=replace(tiny_recipe.optim, schedule_epochs=2),
    )
    whole, _ = _trainer(two, tiny_plan, tmp_path / "whole")
    whole.run()
    first, _ = _trainer(replace(two, epochs=1), tiny_plan, tmp_path / "parts")
    first.run()
    second, runtime = _trainer(two, tiny_plan, tmp_path / "parts")
    assert second.state.epoch == 1
    assert any("going on after epoch 1" in line for line in runtime.lines)
    second.run()
    assert second.state.step == whole.state.step
    for name, value in _weights(whole).items():
        torch.testing.assert_close(_weights(second)[name], value, msg=name)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_batch(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    trainer, _ = _trainer(tiny_recipe, tiny_plan, tmp_path)
    with torch.no_grad():
        next(trainer.state.detector.localizer.parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="step 0") as caught:
        trainer.run()
    videos = {video.annotation.video_id for video in tiny_plan.training}
    assert any(video_id in str(caught.value) for video_id in videos)
    (saved,) = (tmp_path / "output").glob("non_finite_step_0.pt")
    batch = torch.load(saved, weights_only=True)
    assert batch["frames"].dtype == torch.uint8
    assert batch["frames"].shape[0] == len(batch["windows"]) == tiny_recipe.batch_size
    assert len(batch["targets"]) == tiny_recipe.batch_size


def test_videos_that_fail_while_training_are_counted(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    good = tiny_plan.training[0]
    broken.write_bytes(Path(good.uri).read_bytes()[:4000])
    bad = Video(annotation=replace(good.annotation, video_id="broken"), uri=str(broken))
    plan = replace(tiny_plan, training=(*tiny_plan.training, bad))
    data = replace(tiny_recipe.data, max_failed=0.5)
    trainer, _ = _trainer(replace(tiny_recipe, data=data), plan, tmp_path)
    metrics = trainer.run()
    assert metrics["videos/failed"] == 1
    assert "broken" in trainer.state.failures
    # an epoch that is not evaluated sees to it too
    data = replace(tiny_recipe.data, max_failed=0.0)
    two = replace(tiny_recipe, data=data, epochs=2, evaluate_from=2)
    trainer, _ = _trainer(two, plan, tmp_path / "two")
    with pytest.raises(UserError, match="broken"):
        trainer.run()
    assert trainer.state.epoch == 1


def test_early_epochs_can_do_without_evaluation(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    reported: list[dict[str, float]] = []

    class Reporting(LocalRuntime):
        def report(self, metrics: Mapping[str, float], checkpoint: Path) -> None:
            reported.append(dict(metrics))
            super().report(metrics, checkpoint)

    recipe = replace(tiny_recipe, epochs=3, evaluate_from=3)
    runtime = Reporting(recipe, tiny_plan, tmp_path)
    task = DetectionTask(recipe=recipe, plan=tiny_plan)
    metrics = Trainer(task, runtime, weights=None, output=str(tmp_path)).run()
    assert [epoch["val/mAP"] for epoch in reported] == [UNSCORED, UNSCORED, metrics["val/mAP"]]
    assert [epoch["epoch"] for epoch in reported] == [1, 2, 3]
    assert sum("val/mAP" in logged for _, logged in runtime.history) == 1
    with pytest.raises(ValueError, match=r"--evaluate-from must be from 1 to the 3 epochs"):
        replace(recipe, evaluate_from=4)


AUGMENTATION = AugmentationConfig(source_size=40, crop_area=(0.2, 0.8), flip=0.5, brightness=0.4)


def test_what_is_trained_on_is_augmented_and_what_is_evaluated_is_not(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    recipe = replace(tiny_recipe, data=replace(tiny_recipe.data, augmentation=AUGMENTATION))
    trainer, runtime = _trainer(recipe, tiny_plan, tmp_path)
    seen: dict[str, list[Tensor]] = {"training": [], "validation": []}
    detectors: dict[str, Any] = {
        "training": trainer.state.detector,
        "validation": trainer.state.average.module,
    }
    for name, detector in detectors.items():
        normalized = detector.normalized

        def shown(frames: Tensor, of: str = name, make: Any = normalized) -> Tensor:
            seen[of].append(frames.clone())
            return cast("Tensor", make(frames))

        detector.normalized = shown
    decoded: list[tuple[int, Batch]] = []
    stream = runtime.stream

    def recorded(windows: Sequence[Window], *, size: int, name: str = "") -> Iterator[Batch]:
        assert name.startswith("epoch 1")
        for batch in stream(windows, size=size):
            decoded.append((size, batch))
            yield batch

    runtime.stream = recorded  # type: ignore[method-assign]
    trainer.run()
    larger = [batch for size, batch in decoded if size == 40]
    plain = [batch for size, batch in decoded if size == 32]
    assert len(larger) == len(seen["training"]) == trainer.state.step
    for batch, frames in zip(larger, seen["training"], strict=True):
        seeds = [clip_seed(window, seed=recipe.seed, epoch=0) for window in batch.windows]
        assert torch.equal(frames, augment(batch.frames, AUGMENTATION, size=32, seeds=seeds))
        assert frames.shape[2:] == (32, 32, 3)
    assert len(plain) == len(seen["validation"]) > 0
    for batch, frames in zip(plain, seen["validation"], strict=True):
        assert torch.equal(frames, batch.frames)


def test_a_window_is_augmented_alike_on_whichever_worker(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    recipe = replace(tiny_recipe, data=replace(tiny_recipe.data, augmentation=AUGMENTATION))

    def augmented(rank: int, world_size: int, epoch: int = 0) -> dict[tuple[str, float], Tensor]:
        trainer, runtime = _trainer(recipe, tiny_plan, tmp_path)
        runtime.rank, runtime.world_size = rank, world_size
        trainer.state.epoch = epoch
        windows = trainer._windows(0)[:4]  # of the first epoch, to see what the other changes
        return {
            (window.video_id, window.grid.offset): frames
            for batch in runtime.stream(windows, size=40)
            for window, frames in zip(batch.windows, trainer._augmented(batch), strict=True)
        }

    alone = augmented(0, 1)
    for rank in (0, 1):
        shared = augmented(rank, 2)
        both = alone.keys() & shared.keys()
        assert both
        assert all(torch.equal(alone[place], shared[place]) for place in both)
    later = augmented(0, 1, epoch=1)
    assert not any(torch.equal(alone[place], later[place]) for place in alone)
