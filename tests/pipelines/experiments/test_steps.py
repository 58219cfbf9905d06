"""Experiments on training steps, at toy size: their results hold what they measure."""

from typing import Any

import pytest
import torch
from torch import nn

from pipelines.experiments import devices
from pipelines.experiments.exactness import drift, rebuilt_error
from pipelines.experiments.memory import predicted_step
from pipelines.experiments.models import STACKS, build, stack
from pipelines.experiments.speed import checks_alone
from pipelines.experiments.timing import compared, in_turns, paired
from pipelines.training.workload import Workload
from re2tal.memory.ways import WAYS, prepared
from re2tal.reversible import branches, reversible_stages
from re2tal.reversible.watch import Watch, Witness

TOY = Workload(frames=4, size=32)


def gradients(model: nn.Module, work: Workload) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    work.step(model, *work.noise())
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_model_is_as_it_was_after_every_variant() -> None:
    model = build("toy_swin")
    before = gradients(model, TOY)
    for way in WAYS.values():
        with prepared(model, way.prepare):
            gradients(model, TOY)
        assert not list(reversible_stages(model))
        assert all("forward" not in vars(module) for module in model.modules())
    assert all(map(torch.equal, before, gradients(model, TOY)))


def test_checkpoints_keep_the_function_and_run_every_block_twice() -> None:
    model = build("toy_swin")
    before = gradients(model, TOY)
    calls = []
    block = model.get_submodule("features.2.1")
    block.get_submodule("mlp").register_forward_hook(lambda *_: calls.append(1))
    with prepared(model, WAYS["checkpointed"].prepare):
        after = gradients(model, TOY)
    assert len(calls) == 2
    assert all(map(torch.equal, before, after))


def test_checkpoints_reach_blocks_that_are_not_reversible() -> None:
    model = build("r3d_18")
    changes_shape = model.get_submodule("layer2.0")
    with prepared(model, WAYS["checkpointed"].prepare):
        assert "forward" in vars(changes_shape)


@pytest.mark.slow
def test_the_small_variants_keep_less_than_plain() -> None:
    work = Workload(frames=8, size=48)
    peaks = {name: predicted_step("toy_swin", work, name).peak for name in WAYS}
    assert peaks["plain"] > peaks["checkpointed"]
    assert peaks["plain"] > peaks["naive"] >= peaks["ours"]


def test_a_step_is_predicted_by_kinds() -> None:
    found = predicted_step("toy_swin", TOY, "plain")
    parameters = sum(p.numel() * 4 for p in build("toy_swin").parameters())
    assert found.parameters == found.gradients == parameters
    assert found.inputs == 4 * 32 * 32 * 3


def test_ways_take_turns_and_the_first_round_does_not_count() -> None:
    seen = []

    def noted(name: str) -> None:
        seen.append(name)

    ways = {name: lambda model, name=name: noted(name) for name in ("a", "b", "c")}
    model, inputs = build("toy_swin"), TOY.noise()
    times = paired(model, lambda: TOY.step(model, *inputs), ways, rounds=2)
    assert "".join(seen) == "abc" + "bca" + "cab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_ratios_are_of_each_round() -> None:
    # A machine that is ten times slower in one round changes no ratio.
    rows = compared({"plain": [1.0, 10.0, 2.0], "ours": [1.5, 15.0, 4.0]}, "plain")
    assert rows[0]["of plain"] == 1
    assert rows[1]["of plain"] == 1.5
    assert rows[1]["seconds"] == 4.0
    assert rows[1]["lower quartile"] == 1.5
    assert rows[1]["upper quartile"] == 2.0


def test_checks_are_timed_and_left_as_they_were() -> None:
    found = Watch.witness, Witness.compare
    row = checks_alone("toy_swin", TOY, rounds=1)
    assert 0 < row["seconds in checks"] < 1
    assert 0 < row["of the step"] < 1
    assert (Watch.witness, Witness.compare) == found


@pytest.mark.parametrize("family", STACKS)
@pytest.mark.parametrize("count", [4, 8])
def test_stacks_have_so_many_branches(family: str, count: int) -> None:
    model, x = stack(family, count)
    assert sum(len(branches(block)) for block in model) == count
    assert model(x).shape == x.shape


@pytest.mark.parametrize("family", STACKS)
def test_drift(family: str) -> None:
    row = drift(family, 4, "float32")
    assert row["gradients, grid"] == 0
    assert 0 < row["rebuilt input, float"] < 1e-5
    assert 0 < row["output, grid against float"] < 1e-3
    assert row["gradients, precision alone"] == 0


def test_drift_grows_with_coarse_branches() -> None:
    coarse, fine = (drift("R3D", 12, precision) for precision in ("float16", "float32"))
    assert coarse["rebuilt input, float"] > fine["rebuilt input, float"]
    assert coarse["gradients, precision alone"] > 0


def test_rebuilding_multiplies_errors_by_one_over_beta() -> None:
    model = nn.Sequential()  # no branch, no error
    assert rebuilt_error(model, torch.randn(3), 0.5, 0.5) == 0
    model, x = stack("LayerNorm-MLP", 8)
    assert rebuilt_error(model, x, 0.5, 0.5) > 4 * rebuilt_error(model, x, 0.0, 1.0) > 0


@pytest.fixture
def _two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prediction and measurement of each way to train, which take seconds."""
    monkeypatch.setattr(devices, "WAYS", {name: WAYS[name] for name in ("plain", "ours")})


@pytest.mark.slow
@pytest.mark.usefixtures("_two_ways")
def test_devices_on_the_cpu() -> None:
    rows = devices.compare("toy_swin", TOY, torch.device("cpu"), rounds=2)
    assert [row["training"] for row in rows] == ["plain", "ours"]
    assert all(row["seconds"] > 0 for row in rows)
    assert {row["peak, GB"] for row in rows} == {"not counted"}  # and nothing made up
    assert rows[0]["of plain"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_two_ways")
def test_devices_record_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    run = devices._run

    def too_large(*arguments: Any) -> Any:
        tried.append(arguments)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("no room")
        return run(*arguments)

    monkeypatch.setattr(devices, "_run", too_large)
    rows = devices.compare("toy_swin", TOY, torch.device("cpu"), rounds=2)
    assert rows[0]["peak, GB"] == devices.OUT_OF_MEMORY
    assert rows[0]["seconds"] == ""
    assert len(tried) == 1 + 2 * len(rows[1:])
    assert all(row["predicted, GB"] > 0 for row in rows)
    assert all(row["seconds"] > 0 and row["of plain"] == "" for row in rows[1:])


@pytest.mark.usefixtures("_two_ways")
def test_devices_tabulate_every_length() -> None:
    (rows,) = devices.measure_devices(
        device="cpu", models=("toy_swin",), frames=(4, 8), size=32, rounds=1
    ).values()
    assert [row["frames"] for row in rows] == [4, 4, 8, 8]


def test_results_of_two_ways_are_taken_in_turns() -> None:
    counted = iter(range(100))
    ways = {"a": lambda: next(counted), "b": lambda: next(counted)}
    assert in_turns(ways, 2) == {"a": [3, 4], "b": [2, 5]}
