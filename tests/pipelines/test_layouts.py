"""Losses and weights do not depend on how a step's windows are laid out over workers and passes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.config.recipe import Recipe
from pipelines.data.plan import Plan
from pipelines.training.detection import DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.trainer import Trainer
from re2tal.localizers.vsgn import VSGNConfig
from tests.ranks import Ranks

Result = tuple[list[dict[str, float]], dict[str, Tensor]]


def _train(
    recipe: Recipe, plan: Plan, folder: Path, *, rank: int = 0, world_size: int = 1
) -> Result:
    runtime = LocalRuntime(recipe, plan, folder / str(rank))
    runtime.rank, runtime.world_size = rank, world_size
    trainer = Trainer(
        DetectionTask(recipe=recipe, plan=plan),
        runtime,
        weights=None,
        output=str(folder / "output"),
    )
    trainer.run()
    steps = [metrics for _, metrics in runtime.history if "train/loss" in metrics]
    return steps, trainer.state.detector.state_dict()


def _worker(rank: int, jobs: Sequence[tuple[Recipe, Path]], plan: Plan) -> None:
    for recipe, folder in jobs:
        result = _train(recipe, plan, folder, rank=rank, world_size=2)
        if rank == 0:
            torch.save(result, folder / "result.pt")


def _layout(recipe: Recipe, batch_size: int, accumulation: int = 1) -> Recipe:
    optim = replace(recipe.optim, accumulation=accumulation)
    return replace(recipe, batch_size=batch_size, optim=optim)


def _compare(one: Result, other: Result) -> None:
    (steps, weights), (other_steps, other_weights) = one, other
    assert len(steps) == len(other_steps) >= 2
    for step, other_step in zip(steps, other_steps, strict=True):
        for name in step:
            if name.startswith(("train/loss", "train/gradient", "lr/")):
                assert other_step[name] == pytest.approx(step[name], rel=1e-4), name
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_one_worker_two_workers_and_accumulated_passes_end_alike(
    tiny_recipe: Recipe, tiny_plan: Plan, tmp_path: Path, ranks: Ranks
) -> None:
    # AdamW's first steps are as long whatever the gradient: of noise too. A larger epsilon is not
    # an option of the recipe, so few steps at a small rate.
    recipe = replace(
        tiny_recipe, optim=replace(tiny_recipe.optim, backbone_lr=1e-5, localizer_lr=1e-4)
    )
    vsgn: Any = VSGNConfig(
        width=32, levels=3, stem_stride=1, head_layers=1, neighbours=3, anchor_scales=(2.0,)
    )
    with_vsgn = replace(recipe, model=replace(recipe.model, localizer=vsgn))
    jobs = []
    for name, each in (("actionformer", recipe), ("vsgn", with_vsgn)):
        (tmp_path / name).mkdir()
        jobs.append((_layout(each, 2), tmp_path / name))
    ranks.run(_worker, jobs, tiny_plan)
    whole = _train(_layout(recipe, 4), tiny_plan, tmp_path / "whole")
    # one of two workers is left
    elastic = replace(recipe, scale=replace(recipe.scale, workers=2, min_workers=1))
    _compare(whole, _train(_layout(elastic, 2), tiny_plan, tmp_path / "elastic"))
    accumulated = _train(_layout(recipe, 1, accumulation=4), tiny_plan, tmp_path / "accumulated")
    _compare(whole, accumulated)
    _compare(whole, torch.load(tmp_path / "actionformer" / "result.pt", weights_only=True))
    # which of VSGN's anchors count is known after the network has moved them: not ahead of a pass
    of_vsgn = _train(_layout(with_vsgn, 4), tiny_plan, tmp_path / "whole_vsgn")
    _compare(of_vsgn, torch.load(tmp_path / "vsgn" / "result.pt", weights_only=True))
