"""The code of the benchmarks, at toy size; what they measure is in their results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.experiments.benchmarking import markdown
from re2tal.reversible import branches, reversible_stages
from re2tal.reversible.benchmarks import devices, memory
from re2tal.reversible.benchmarks.__main__ import RESULTS, main
from pipelines.experiments.drift import drift, rebuilt_error
from pipelines.experiments.stacks import STACKS, stack
from pipelines.experiments.timing import compared, paired
from pipelines.experiments.variants import VARIANTS, prepared
from pipelines.experiments.verify import checks_alone
from pipelines.experiments.models import Workload
from re2tal.reversible.watch import Watch, Witness

TOY = Workload(model="toy_swin", frames=4, size=32)


def gradients(model: nn.Module, workload: Workload) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    workload.step(model, workload.video())
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_model_is_as_it_was_after_every_variant() -> None:
    model = TOY.build()
    before = gradients(model, TOY)
    for prepare in VARIANTS.values():
        with prepared(model, prepare):
            gradients(model, TOY)
        assert not list(reversible_stages(model))
        assert all("forward" not in vars(module) for module in model.modules())
    assert all(map(torch.equal, before, gradients(model, TOY)))


def test_checkpoints_keep_the_function_and_run_every_block_twice() -> None:
    model = TOY.build()
    before = gradients(model, TOY)
    calls = []
    block = model.get_submodule("features.2.1")
    block.get_submodule("mlp").register_forward_hook(lambda *_: calls.append(1))
    with prepared(model, VARIANTS["checkpoint"]):
        after = gradients(model, TOY)
    assert len(calls) == 2
    assert all(map(torch.equal, before, after))


def test_checkpoints_reach_blocks_that_are_not_reversible() -> None:
    model = Workload(model="r3d_18", frames=4, size=16).build()
    changes_shape = model.get_submodule("layer2.0")
    with prepared(model, VARIANTS["checkpoint"]):
        assert "forward" in vars(changes_shape)


@pytest.mark.slow
def test_the_small_variants_keep_less_than_plain() -> None:
    workload = Workload(model="toy_swin", frames=8, size=48)
    peaks = {name: memory.predicted_step(workload, name).peak for name in VARIANTS}
    assert peaks["plain"] > peaks["checkpoint"]
    assert peaks["plain"] > peaks["naive"] >= peaks["ours"]


def test_predicted_columns_are_the_prediction() -> None:
    (row,) = memory.predicted(TOY, ["plain"])
    found = memory.predicted_step(TOY, "plain")
    assert row["peak, GB"] == found.peak / 1e9
    parameters = sum(p.numel() * 4 for p in TOY.build().parameters())
    buffers = sum(b.numel() * b.element_size() for b in TOY.build().buffers())
    assert row["parameters, GB"] == (parameters + buffers) / 1e9
    assert row["gradients, GB"] == parameters / 1e9


@pytest.mark.slow
def test_resident_memory_of_a_fresh_process() -> None:
    workload = Workload(model="toy_swin", frames=32, size=128)
    (row,) = memory.resident(workload, ["plain"], repetitions=1)
    assert row["MB"] == pytest.approx(row["MB, predicted"], rel=0.5)


def test_ways_take_turns_and_the_first_round_does_not_count() -> None:
    seen = []

    def noted(name: str) -> None:
        seen.append(name)

    ways = {name: lambda model, name=name: noted(name) for name in ("a", "b", "c")}
    times = paired(TOY.build(), TOY, TOY.video(), ways, rounds=2)
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
    row = checks_alone(TOY, rounds=1)
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
    """Each way to train is predicted and measured, which takes seconds."""
    monkeypatch.setattr(devices, "VARIANTS", {name: VARIANTS[name] for name in ("plain", "ours")})


@pytest.mark.slow
@pytest.mark.usefixtures("_two_ways")
def test_devices_on_the_cpu() -> None:
    rows = devices.compare(TOY, torch.device("cpu"), rounds=2)
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
    rows = devices.compare(TOY, torch.device("cpu"), rounds=2)
    assert rows[0]["peak, GB"] == devices.OUT_OF_MEMORY
    assert rows[0]["seconds"] == ""
    assert len(tried) == 1 + 2 * len(rows[1:])
    assert all(row["predicted, GB"] > 0 for row in rows)
    assert all(row["seconds"] > 0 and row["of plain"] == "" for row in rows[1:])


@pytest.mark.usefixtures("_two_ways")
def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "devices.json"
    command = "devices --device cpu --models toy_swin --frames 4 --size 32 --rounds 1 --threads 1"
    main([*command.split(), "--output", str(output)])
    record = json.loads(output.read_text())
    assert record["threads"] == 1
    assert record["torch"] == torch.__version__
    assert record["command"].endswith(command)
    (rows,) = record["tables"].values()
    assert [row["frames"] for row in rows] == [4, 4]
    assert capsys.readouterr().out == markdown(output) + "\n"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_readme_shows_the_results(path: Path) -> None:
    assert markdown(path) in (RESULTS.parent / "README.md").read_text(encoding="utf-8")
