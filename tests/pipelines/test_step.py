"""Training step: skipped if gradients overflow, with masks that are new but reproducible."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.config.choices import with_backbone
from pipelines.config.recipe import Recipe
from pipelines.data.batches import Batch
from pipelines.data.plan import Plan
from pipelines.training.detection import DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.stepper import in_passes, seed_step
from pipelines.training.trainer import Trainer


def _trainer(recipe: Recipe, plan: Plan, folder: Path) -> tuple[Trainer, list[Batch]]:
    runtime = LocalRuntime(recipe, plan, folder)
    task = DetectionTask(recipe=recipe, plan=plan)
    trainer = Trainer(task, runtime, weights=None, output=str(folder / "output"))
    windows = trainer._windows(0)[: recipe.batch_size]
    trainer.state.detector.train()
    return trainer, list(runtime.stream(windows, size=recipe.data.size))


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.state.detector.named_parameters()}


def test_a_float16_step_whose_gradients_overflow_is_left_out(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    recipe = replace(tiny_recipe, optim=replace(tiny_recipe.optim, precision="float16"))
    trainer, batches = _trainer(recipe, tiny_plan, tmp_path)
    before, rate = _weights(trainer), trainer.state.schedule.get_last_lr()
    trainer.state.scaler.load_state_dict({**trainer.state.scaler.state_dict(), "scale": 2.0**60})
    metrics = trainer.step(batches)
    assert metrics["train/loss_scale"] == 2.0**59
    assert all(torch.equal(value, before[name]) for name, value in _weights(trainer).items())
    assert trainer.state.schedule.get_last_lr() == rate
    trainer.state.scaler.load_state_dict({**trainer.state.scaler.state_dict(), "scale": 8.0})
    learnt = trainer.step(batches)
    assert learnt["train/gradient_norm"] > 0
    assert any(not torch.equal(v, before[name]) for name, v in _weights(trainer).items())
    assert trainer.state.schedule.get_last_lr() != rate


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_step_in_half_precision_is_near_that_in_single(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path, precision: str
) -> None:
    found = {}
    for name in ("float32", precision):
        optim = replace(tiny_recipe.optim, precision=name)  # type: ignore[arg-type]
        trainer, batches = _trainer(replace(tiny_recipe, optim=optim), tiny_plan, tmp_path / name)
        found[name] = trainer.step(batches)
    # the norm is mostly that of rounding-prone sums over all places
    for name, error in (("train/loss", 0.05), ("train/gradient_norm", 0.3)):
        assert found[precision][name] == pytest.approx(found["float32"][name], rel=error), name
        assert found[precision][name] != found["float32"][name], name


def test_gradients_are_clipped_and_their_norm_before_is_told(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    optim = replace(tiny_recipe.optim, clip=1e-3)
    trainer, batches = _trainer(replace(tiny_recipe, optim=optim), tiny_plan, tmp_path)
    told = trainer.step(batches)["train/gradient_norm"]
    gradients = [p.grad for p in trainer.state.detector.parameters() if p.grad is not None]
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert told > 1e-2


def test_masks_differ_from_step_to_step_and_rank_to_rank_and_can_be_drawn_again() -> None:
    def drawn(seed: int, step: int, rank: int) -> Tensor:
        seed_step(seed, step=step, rank=rank)
        return torch.rand(8)

    first = drawn(3, 5, 1)
    assert torch.equal(first, drawn(3, 5, 1))
    for other in (drawn(4, 5, 1), drawn(3, 6, 1), drawn(3, 5, 0), drawn(3, 1, 5)):
        assert not torch.equal(first, other)


def test_batches_that_fill_no_step_are_left_out() -> None:
    batches: Any = iter(range(7))
    steps: Any = list(in_passes(batches, 3))
    assert steps == [(0, 1, 2), (3, 4, 5)]


def test_a_step_of_a_model_of_clips_trains_all_of_it(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    recipe, _ = with_backbone(tiny_recipe, ["--model.backbone=videomae_toy"], "--model.backbone")
    recipe = replace(recipe, optim=replace(recipe.optim, layer_decay=0.5))
    trainer, batches = _trainer(recipe, tiny_plan, tmp_path)
    before = _weights(trainer)
    assert "backbone.encoder.layer.3.output.dense.weight" in before
    learnt = trainer.step(batches)
    assert learnt["train/gradient_norm"] > 0
    same = [name for name, value in _weights(trainer).items() if torch.equal(value, before[name])]
    assert not [name for name in same if name.startswith("backbone.")]
