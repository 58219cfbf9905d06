"""A checkpoint is taken for good only if it is whole."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config.recipe import Recipe
from pipelines.data.batches import Batch
from pipelines.data.plan import Plan
from pipelines.training.checkpoints import complete, is_complete
from pipelines.training.detection import DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.optimizer import build_optimizer, build_schedule
from pipelines.training.resuming import newest_checkpoint
from pipelines.training.trainer import Trainer
from re2tal.errors import UserError
from re2tal.videos.windows import Window


def _trainer(recipe: Recipe, plan: Plan, folder: Path) -> Trainer:
    runtime = LocalRuntime(recipe, plan, folder)
    return Trainer(
        DetectionTask(recipe=recipe, plan=plan),
        runtime,
        weights=None,
        output=str(folder / "output"),
    )


@pytest.fixture
def checkpoint(tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path) -> Path:
    trainer = _trainer(tiny_recipe, tiny_plan, tmp_path)
    folder = tmp_path / "checkpoint_2026-01-01"
    trainer.state.save(folder, trainer.task.spec)
    complete(folder)
    return folder


def test_what_an_interrupted_copy_leaves_is_no_checkpoint(
    checkpoint: Path, tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    assert is_complete(checkpoint)
    trainer = _trainer(tiny_recipe, tiny_plan, tmp_path)
    trainer.state.load(checkpoint)
    for path in [p for p in checkpoint.rglob("*") if p.is_file()]:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert not is_complete(checkpoint), path
        path.unlink()
        assert not is_complete(checkpoint), path
        with pytest.raises(UserError, match="not whole"):
            trainer.state.load(checkpoint)
        path.write_bytes(content)
    assert is_complete(checkpoint)


def test_the_newest_whole_checkpoint_is_found(checkpoint: Path) -> None:
    later = checkpoint.with_name("checkpoint_2026-01-02")
    run = str(checkpoint.parent)
    assert newest_checkpoint(run) == str(checkpoint)
    later.mkdir()
    (later / "training.pt").write_bytes(b"half")
    assert newest_checkpoint(run) == str(checkpoint)
    complete(later)
    assert newest_checkpoint(run) == str(later)
    assert newest_checkpoint(f"{run}/nowhere") is None


def test_nothing_in_a_checkpoint_is_unpickled(checkpoint: Path) -> None:
    for path in checkpoint.rglob("*.pt"):
        torch.load(path, weights_only=True)
    assert {p.suffix for p in checkpoint.rglob("*") if p.is_file()} == {
        ".pt",
        ".json",
        ".safetensors",
    }


@pytest.mark.slow
def test_a_run_goes_on_from_the_midst_of_an_epoch_bit_for_bit(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    dropping = replace(tiny_recipe.model.localizer, drop_path=0.2)  # type: ignore[type-var]
    recipe = replace(
        tiny_recipe,
        model=replace(tiny_recipe.model, localizer=dropping),
        checkpoints=replace(tiny_recipe.checkpoints, steps=2),
    )
    whole = _trainer(recipe, tiny_plan, tmp_path / "whole")
    whole.run()
    first = _trainer(recipe, tiny_plan, tmp_path / "parts")
    take = first.step
    taken: list[Sequence[Batch]] = []

    def twice(passes: Sequence[Batch]) -> dict[str, float]:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(passes)
        return take(passes)

    first.step = twice  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = _trainer(recipe, tiny_plan, tmp_path / "parts")
    assert (second.state.step, second.state.windows) == (2, 2 * recipe.batch_size)
    second.run()
    assert second.state.step == whole.state.step
    for name, value in whole.state.detector.state_dict().items():
        assert torch.equal(value, second.state.detector.state_dict()[name]), name
    for name, value in whole.state.average.state_dict().items():
        assert torch.equal(value, second.state.average.state_dict()[name]), name


def test_a_notice_that_a_node_goes_away_is_answered_by_a_checkpoint(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.training.trainer.PREEMPTION_STEPS", 2)
    trainer = _trainer(tiny_recipe, tiny_plan, tmp_path)
    runtime: Any = trainer.runtime
    asked, reported = [], []

    def preempted() -> bool:
        asked.append(trainer.state.step)
        return len(asked) == 1

    def report(metrics: dict[str, float], checkpoint: Path) -> None:
        assert is_complete(checkpoint)
        state = torch.load(checkpoint / "training.pt", weights_only=True)
        reported.append((state["epoch"], state["step"], metrics["val/mAP"] >= 0))

    runtime.preempted, runtime.report = preempted, report
    trainer.run()
    last = trainer.state.step
    assert asked[0] == 2
    assert all(step % 2 == 0 for step in asked)
    assert reported == [(0, 2, False), (1, last, True)]


def test_more_workers_take_up_what_fewer_left(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path
) -> None:
    recipe = replace(tiny_recipe, batch_size=1)
    alone = _trainer(recipe, tiny_plan, tmp_path)
    everything = alone._windows(0)
    alone.state.windows, alone.state.step = 3, 3
    left: list[Window] = []
    for rank in range(2):
        runtime = LocalRuntime(recipe, tiny_plan, tmp_path / "workers")
        runtime.rank, runtime.world_size = rank, 2
        if rank == 0:
            folder = tmp_path / "workers" / "checkpoint"
            folder.mkdir(parents=True)
            alone.state.save(folder, alone.task.spec)
            complete(folder)
        task = DetectionTask(recipe=recipe, plan=tiny_plan)
        both = Trainer(task, runtime, weights=None, output=str(tmp_path / "output"))
        assert (both.state.windows, both.state.world_size) == (3, 2)
        assert both._steps == len(everything) // 2
        left += both._windows(0, behind=both.state.windows)
    whole_steps = (len(everything) - 3) // 2 * 2
    expected = [(w.video_id, w.grid) for w in everything[3 : 3 + whole_steps]]
    assert sorted(map(str, expected)) == sorted(str((w.video_id, w.grid)) for w in left)
    # as if two had trained all along, one step lay behind
    schedule = build_schedule(
        build_optimizer(both.state.detector, recipe.optim),
        recipe.optim,
        steps_per_epoch=both._steps,
        epochs=recipe.epochs,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule.step()
    assert both.state.schedule.get_last_lr() == pytest.approx(schedule.get_last_lr())
    assert both._windows(0, behind=len(everything) - 1) == []
