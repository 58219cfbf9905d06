"""A run sharded over two workers (FSDP2) ends as an unsharded one, and resumes."""

import copy
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pipelines.config.recipe import Recipe
from pipelines.data.plan import Plan
from pipelines.training.beside import evaluate
from pipelines.training.checkpoints import Waiting, complete, read_listing, shard, whole_state
from pipelines.training.detection import DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.trainer import Trainer
from re2tal.backbones.adapters import AdapterConfig, additions
from re2tal.backbones.lora import LoraConfig
from re2tal.errors import UserError
from re2tal.localizers import Targets
from tests.backbones.test_adapters import ADAPTERS, LORA, spec
from tests.backbones.test_clips import TINY
from tests.ranks import Ranks
from tests.reversible.zoo import scrambled


def _trainer(recipe: Recipe, plan: Plan, folder: Path, rank: int) -> Trainer:
    runtime = LocalRuntime(recipe, plan, folder / str(rank))
    runtime.rank, runtime.world_size = rank, 2
    task = DetectionTask(recipe=recipe, plan=plan)
    if rank > 0:  # Ray Train gives each worker what rank 0 reported
        runtime.report = lambda metrics, checkpoint: None  # type: ignore[method-assign]
        runtime._checkpoint = folder / "0" / "checkpoint"
    return Trainer(task, runtime, weights=None, output=str(folder / "output"))


def _worker(rank: int, recipe: Recipe, plan: Plan, folder: Path) -> None:
    for name, sharded in (("whole", False), ("split", True)):
        scale = replace(recipe.scale, sharded=sharded)
        each = replace(recipe, scale=scale)
        _trainer(replace(each, epochs=1), plan, folder / name, rank).run()
        dist.barrier()
        second = _trainer(each, plan, folder / name, rank)
        assert second.state.epoch == 1
        split = [isinstance(p, DTensor) for p in second.state.detector.parameters()]
        assert all(split) if sharded else not any(split)
        second.run()
        dist.barrier()


def _state(folder: Path) -> dict[str, Tensor]:
    state = torch.load(folder / "0" / "checkpoint" / "training.pt", weights_only=True)
    assert state["epoch"] == 2
    return {
        f"{part}.{name}": value
        for part in ("detector", "average")
        for name, value in state[part].items()
    }


@pytest.mark.slow
def test_it_ends_as_it_does_unsplit(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path, ranks: Ranks
) -> None:
    optim = replace(tiny_recipe.optim, schedule_epochs=2, accumulation=2)
    recipe = replace(tiny_recipe, epochs=2, batch_size=1, optim=optim)
    for name in ("whole", "split"):
        (tmp_path / name / "0").mkdir(parents=True)
    ranks.run(_worker, recipe, tiny_plan, tmp_path)
    whole, split = _state(tmp_path / "whole"), _state(tmp_path / "split")
    assert whole.keys() == split.keys()
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-3, atol=1e-5, msg=name)
    # one process evaluates the checkpoint of split workers as they did
    folder = tmp_path / "split" / "0" / "checkpoint"
    expected = read_listing(folder).metrics
    waiting = Waiting(steps=3, parts=(2,), threads=1, failures={})
    runtime = LocalRuntime(recipe, tiny_plan, tmp_path)
    task = DetectionTask(recipe=recipe, plan=tiny_plan)
    found = evaluate(task, runtime, folder, epoch=2, waiting=waiting).metrics
    for name, metric in found.items():
        assert metric == pytest.approx(expected[name], rel=1e-4), name


def _full(place: Path) -> SimpleNamespace:
    return SimpleNamespace(free=0)


def _one_rank_is_hit(rank: int, recipe: Recipe, plan: Plan, folder: Path) -> None:
    for sharded in (False, True):
        each = replace(recipe, scale=replace(recipe.scale, sharded=sharded))
        trainer = _trainer(each, plan, folder / str(sharded), rank)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr("pipelines.core.storage.shutil.disk_usage", _full)
            with pytest.raises(UserError, match="There is no room for a checkpoint"):
                trainer.run()
        assert trainer.state.step == 1
        places = [folder / str(sharded) / name for name in ("first", "second")]
        for step, place in enumerate(places, start=1):
            trainer.state.step = step
            trainer.state.save(place, trainer.task.spec, write=rank == 0)
            if rank == 0:
                complete(place, {})
            dist.barrier()
        if rank == 1:
            damaged = places[1].with_name("damaged")
            shutil.copytree(places[1], damaged)
            (damaged / "training.pt").write_bytes(b"\0" * (damaged / "training.pt").stat().st_size)
            places[1] = damaged
        found = [nullcontext(place) for place in reversed(places)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalRuntime, "checkpoints", lambda _, found=found: found)
            assert _trainer(each, plan, folder / str(sharded), rank).state.step == 1


@pytest.mark.slow
def test_what_hits_one_worker_is_answered_by_all(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path, ranks: Ranks
) -> None:
    checkpoints = replace(tiny_recipe.checkpoints, steps=1)
    recipe = replace(tiny_recipe, batch_size=1, checkpoints=checkpoints)
    ranks.run(_one_rank_is_hit, recipe, tiny_plan, tmp_path)


def test_a_float16_loss_is_refused(tiny_recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        replace(
            tiny_recipe,
            scale=replace(tiny_recipe.scale, sharded=True),
            optim=replace(tiny_recipe.optim, precision="float16"),
        )


def _one_step(rank: int, tuning: AdapterConfig | LoraConfig | None) -> None:
    """Compare gradients on a batch of each rank: of one detector sharded, averaged and alone."""
    torch.manual_seed(0)
    detector: Any = scrambled(spec(TINY, tuning).build()).train()
    if tuning is not None:
        detector.backbone.requires_grad_(False)
        for part in additions(detector.backbone):
            part.requires_grad_(True)
    alone, averaged = copy.deepcopy(detector), copy.deepcopy(detector)
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    shard(detector, device=torch.device("cpu"), workers=2)
    assert all(isinstance(p, DTensor) for p in detector.parameters())
    found = whole_state(detector)
    assert all(torch.equal(value, found[name]) for name, value in state.items())
    torch.manual_seed(10 + rank)
    frames = torch.randint(256, (1, 32, 16, 16, 3), dtype=torch.uint8)
    mask = torch.ones(1, 32, dtype=torch.bool)
    targets = [Targets(segments=torch.tensor([[2.0, 6.5]]), labels=torch.tensor([1]))]
    for model in (detector, DistributedDataParallel(averaged), alone):
        torch.manual_seed(20 + rank)
        torch.stack([*model(frames, mask, targets).values()]).sum().backward()
    trained = 0
    for name, parameter in alone.named_parameters():
        gradients = [m.get_parameter(name).grad for m in (detector, averaged)]
        assert all((g is None) is (parameter.grad is None) for g in gradients), name
        if parameter.grad is None:
            continue
        dist.all_reduce(parameter.grad)
        trained += name.startswith("backbone.")
        for gradient in gradients:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            torch.testing.assert_close(whole, parameter.grad / 2, msg=name)
    assert trained == sum(p.requires_grad for p in alone.backbone.parameters()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [None, ADAPTERS, LORA], ids=["full", "adapters", "lora"])
def test_a_backbone_in_a_list_of_blocks_is_split_with_what_learns_beside_it(
    ranks: Ranks, tuning: AdapterConfig | LoraConfig | None
) -> None:
    ranks.run(_one_step, tuning)
