"""Memory planner: four ways to run a step, what fits, tables, files, the command line."""

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from pipelines.config.recipe import Recipe
from pipelines.experiments.planner import Planner, backbone_alone, of_recipe
from pipelines.experiments.profiles import (
    BackboneProfile,
    Profile,
    Questions,
    RecipeProfile,
    main,
    parse,
    profile,
    rows,
    section,
)
from pipelines.training.model import build_detector
from pipelines.training.workload import Workload
from re2tal.backbones import table
from re2tal.backbones.adapters import AdapterConfig, refuse_unused
from re2tal.backbones.lora import LoraConfig
from re2tal.backbones.slowfast import slowfast_toy
from re2tal.backbones.swin import SwinConfig, swin_toy
from re2tal.backbones.table import entry_of
from re2tal.memory import predict_peak
from re2tal.memory.fit import largest_that_fits, parse_size
from re2tal.memory.ways import KEEPING, WAYS, residual_blocks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("80 GB", 80 * 10**9),
        ("1.5gib", 3 * 2**29),
        ("512MiB", 2**29),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "24 apples", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="for example 24GiB"):
        parse_size(text)


CURVES: dict[str, Callable[[int], int]] = {
    "line": lambda n: 1000 + 37 * n,
    "bent": lambda n: 1000 + max(2 * n, 37 * n - 4000),
    "square": lambda n: 50 * n * n,
    "steps": lambda n: 900 * math.ceil(n / 7),
}


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES.keys())
@pytest.mark.parametrize("budget", [10, 1036, 1037, 5000, 123_456])
@pytest.mark.parametrize("start", [1, 40, 5000])
def test_the_largest_that_fits_is_found_in_few_steps(
    curve: Callable[[int], int], budget: int, start: int
) -> None:
    tried = []

    def peak(n: int) -> int:
        tried.append(n)
        return curve(n)

    found = largest_that_fits(peak, budget, start=start)
    assert found == max((n for n in range(1, 6000) if curve(n) <= budget), default=0)
    assert min(tried) >= 1
    assert len(tried) == len(set(tried)) <= 24
    if curve is CURVES["line"]:
        assert len(tried) <= 6
    known = {n: curve(n) for n in (40, 80)}
    tried.clear()
    assert largest_that_fits(peak, budget, start=40, found=known) == found
    assert not known.keys() & set(tried)
    if curve is CURVES["line"]:
        assert len(tried) <= 3


def test_blocks_that_change_the_shape_are_residual_blocks_too() -> None:
    swin = residual_blocks(swin_toy().build())
    assert swin == ["features.0.0", "features.0.1", "features.2.0", "features.2.1"]
    slowfast = slowfast_toy().build()
    names = {name for name, m in slowfast.named_modules() if type(m).__name__ == "Bottleneck"}
    assert set(residual_blocks(slowfast)) == names
    assert type(slowfast.slow_path.layer1) is nn.Sequential  # the model itself is not rewired


def test_checkpointing_changes_memory_and_nothing_else() -> None:
    torch.manual_seed(0)
    model, x = swin_toy().build(), torch.randn(1, 3, 8, 32, 32)
    other = copy.deepcopy(model)
    WAYS["checkpointed"].prepare(other)
    again = copy.deepcopy(other)  # a copy runs its own blocks
    nn.init.zeros_(other.features[0][0].mlp[0].weight)
    outputs = [m(x) for m in (model, again)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    assert predict_peak(again, x).activations < 0.7 * predict_peak(model, x).activations


def shallow() -> SwinConfig:
    """Toy Swin with one block per stage, since each prediction runs all blocks."""
    return replace(swin_toy(), depths=(1, 1))


def small(**changes: object) -> BackboneProfile:
    asked = BackboneProfile(backbone="swin_toy", frames=32, size=32, precision="float32")
    return replace(asked, **changes)  # type: ignore[arg-type]


def test_the_step_begins_with_the_frames_as_decoded() -> None:
    work = Workload(batch=2, frames=16, size=32, precision="float32")
    subject = backbone_alone("swin_toy", work)
    detector = subject.build(subject.depth, "cpu")
    frames, mask = work.inputs()
    assert frames.dtype == torch.uint8
    (features,) = work.forward(detector, frames.random_(), mask)
    expected = detector.backbone(detector.normalized(frames))
    assert torch.allclose(features, expected)
    found = predict_peak(detector, frames, mask, step=work.forward)
    assert found.inputs == 2 * 16 * 32 * 32 * 3 + 2 * 16


def test_frames_and_weights_that_no_memory_holds_are_predicted() -> None:
    frames, wide = 2**28, replace(shallow(), embed_dim=2**14)
    subject = replace(small(frames=frames).subject(), backbone=wide)
    predicted = Planner(subject).predict("ours")
    assert predicted.inputs == frames * (32 * 32 * 3 + 1)  # 825 GB
    assert predicted.parameters > 50e9


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingConfig(SwinConfig):
    """Shape whose constructor reads values, as those do that compute rates of drop path."""

    def build(self) -> Any:
        assert [rate.item() for rate in torch.linspace(0, 0.1, 3)][-1] > 0
        return SwinConfig.build(self)


@pytest.mark.parametrize("addition", [None, AdapterConfig(), LoraConfig(layers="mlp")])
def test_a_constructor_that_reads_values_is_run_on_the_processor(addition: Any) -> None:
    shape = {field.name: getattr(shallow(), field.name) for field in fields(SwinConfig)}
    state = torch.get_rng_state()
    if addition is not None:
        refuse_unused(addition, ReadingConfig(**shape), 32)
    found = []
    for kind in (SwinConfig, ReadingConfig):
        subject = backbone_alone("swin_toy", Workload(frames=32, size=32), addition)
        found.append(Planner(replace(subject, backbone=kind(**shape))).predict("ours"))
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_precision_reaches_the_step() -> None:
    peaks = {
        precision: Planner(small(precision=precision).subject()).peak("plain")
        for precision in ("float32", "bfloat16")
    }
    assert peaks["bfloat16"] < 0.9 * peaks["float32"]


def test_the_depth_of_the_deepest_stage_alone_is_changed() -> None:
    subject = backbone_alone("slowfast_50", small(frames=32).subject().work)
    assert subject.depth == 6
    backbone = subject.build(9).backbone
    assert [len(backbone.slow_path.get_submodule(f"layer{i}")) for i in (1, 2, 3, 4)] == [
        3,
        4,
        9,
        3,
    ]


def test_a_model_of_clips_is_profiled_and_made_deeper() -> None:
    subject = backbone_alone("videomae_toy", small(frames=128).subject().work)
    assert subject.depth == 4
    assert subject.unit == 16
    assert len(subject.build(6).backbone.encoder.layer) == 6
    planner = Planner(subject)
    found = {way: planner.explain(way) for way in ("plain", "ours")}
    listed = [what for what, _ in rows(found["plain"], planner.blocks())]
    assert any("backbone.encoder.layer.*.intermediate" in what for what in listed)
    assert found["ours"].memory.activations < found["plain"].memory.activations / 2


@pytest.mark.parametrize("tuning", ["adapters", "lora"])
def test_what_learns_beside_a_backbone_is_profiled_with_its_optimizer(tuning: Any) -> None:
    asked = small(backbone="videomae_toy", tuning=tuning, questions=Questions(optimizer=True))
    subject = asked.subject()
    planner = Planner(subject)
    found = {way: planner.explain(way).memory for way in ("plain", "checkpointed", "ours")}
    detector = subject.build(subject.depth)
    trained = [p.numel() for p in detector.parameters() if p.requires_grad]
    whole = sum(p.numel() for p in detector.parameters())
    assert {m.gradients for m in found.values()} == {4 * sum(trained)}
    assert 0 < sum(trained) < whole / 5
    assert planner.peak("ours") == found["ours"].peak + 4 * (2 * sum(trained) + whole) + sum(
        b.nbytes for b in detector.buffers()
    )
    activations = {way: memory.activations for way, memory in found.items()}
    assert activations["ours"] < activations["checkpointed"] < activations["plain"] / 2
    found_ours = planner.explain("ours")
    told = section(subject, {"ours": Profile(predicted=found_ours)}, None, planner.blocks())
    (row,) = told.tables["Peak of the step"]
    assert row["predicted, GiB"] == planner.peak("ours") / 2**30
    assert row["trained parameters, M"] == sum(trained) / 1e6
    shares = [row["%"] for row in told.tables["What is in memory at the peak"]]
    assert abs(sum(shares) - 100) < len(shares)


def test_a_recipe_is_profiled_whole_and_reversible_or_not(tiny_recipe: Recipe) -> None:
    tiny_recipe = replace(tiny_recipe, model=replace(tiny_recipe.model, backbone=shallow()))
    planner = Planner(of_recipe(tiny_recipe))
    found = {way: planner.explain(way) for way in KEEPING}
    peaks = {way: breakdown.memory.peak for way, breakdown in found.items()}
    assert len(set(peaks.values())) == len(KEEPING)
    assert max(peaks, key=lambda way: peaks[way]) == "plain"
    detector = build_detector(tiny_recipe, [f"class {n}" for n in range(20)], weights=None)
    parameters = sum(p.numel() for p in detector.parameters())
    assert {b.memory.parameters for b in found.values()} == {4 * parameters}
    # a window of 64 frames: stride 2, three levels of the pyramid, attention over 8 patches
    assert planner.subject.unit == 16
    assert planner.frames_that_fit("plain", peaks["plain"]) == 64
    assert planner.frames_that_fit("plain", peaks["plain"] - 1) == 48
    assert planner.frames_that_fit("plain", 1000) == 0


def test_rows_put_the_blocks_of_a_stage_together_and_add_up() -> None:
    planner = Planner(small().subject())
    found = planner.explain("plain")
    listed = list(rows(found, planner.blocks()))
    assert sum(size for _, size in listed) == found.memory.peak
    assert [what for what, _ in listed][-1] == "everything else"
    assert any("backbone.features.0.*.attn" in what for what, _ in listed)
    both = [
        size
        for origin, size in found.parts
        if origin.module in ("backbone.features.0.0.attn", "backbone.features.0.1.attn")
        and origin.operator == "_softmax"
    ]
    assert len(both) == 2
    assert sum(both) in [size for what, size in listed if what.endswith("attn: _softmax")]


@pytest.mark.slow
def test_a_profile_without_a_gpu_says_so_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shallow_toy = replace(entry_of("swin_toy"), make=shallow)
    monkeypatch.setitem(table._ENTRIES, "swin_toy", shallow_toy)
    arguments = "--backbone swin_toy --frames 32 --size 32 --precision float32 --longest 12MiB"
    main([*arguments.split(), "--output", str(tmp_path)], description="")
    printed = capsys.readouterr().out
    assert "per-block checkpointing" in printed
    assert "measured" not in printed
    (file,) = (tmp_path / "profiles").glob("*.json")
    found = json.loads(file.read_text())
    assert found["torch"] == torch.__version__
    assert arguments in found["command"]
    peaks = found["tables"]["Peak of the step"]
    assert [row["way to run it"] for row in peaks] == [WAYS[way].title for way in KEEPING]
    planner, budget = Planner(small().subject()), 12 * 2**20
    for way, row in zip(KEEPING, peaks, strict=True):
        predicted = row["bytes"][0]["peak"]
        assert row["predicted, GiB"] == predicted / 2**30
        assert [32, predicted] in row["against frames"]
        assert [1, predicted] in row["against depth"]
        assert sum(part["bytes"] for part in row["made of"]) <= predicted
        frames = row["frames in 0.01172 GiB"]
        assert frames % 16 == 0, way
        assert planner.peak(way, frames=frames) <= budget < planner.peak(way, frames=frames + 16)
    run_id = printed.split("MLflow run ")[1].split()[0]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    for way, row in zip(KEEPING, peaks, strict=True):
        assert run.data.metrics[f"peak_gib/{way}"] == pytest.approx(row["predicted, GiB"])
        assert run.data.metrics[f"frames_that_fit/{way}"] == row["frames in 0.01172 GiB"]
    assert run.data.params["backbone"] == "swin_toy"
    logged = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/profile.md")
    assert "naive reversible" in logged
    artifacts = {item.path for item in client.list_artifacts(run_id)}
    assert artifacts == {file.name, "profile.md", "profile-swin_toy.png"}


def test_measured_stands_beside_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an abacus")
    subject = small().subject()
    breakdown = Planner(subject).explain("plain")
    found = {
        "plain": Profile(predicted=breakdown, measured=3 * 2**30),
        "ours": Profile(predicted=breakdown),
    }
    told = section(subject, found, None, [])
    plain, ours = told.tables["Peak of the step"]
    assert plain["measured, GiB, an abacus"] == 3.0
    assert ours["measured, GiB, an abacus"] == "out of memory"
    assert told.metrics["measured_gib/plain"] == 3.0
    assert "measured_gib/ours" not in told.metrics


def test_the_command_line_reads_recipes_and_backbones() -> None:
    asked = parse(["toy", "--data.window.frames", "64", "--longest", "1GiB"])
    assert isinstance(asked, RecipeProfile)
    assert asked.recipe.data.window.frames == 64
    assert asked.questions.longest == "1GiB"
    assert asked.name == "profile-toy"
    adapters = ["--backbone", "videomae_b", "--tuning", "adapters", "--adapters.ratio", "8"]
    assert parse(adapters) == BackboneProfile(
        backbone="videomae_b", tuning="adapters", adapters=AdapterConfig(ratio=8)
    )
    assert parse(["--backbone", "swin_b", "--no-curves"]) == BackboneProfile(
        backbone="swin_b", questions=Questions(curves=False)
    )


def test_mistakes_are_told_in_a_sentence() -> None:
    with pytest.raises(SystemExit, match=r"error: There is no recipe 'nothing'\. Choose one of: t"):
        main(["nothing"], description="")
    with pytest.raises(SystemExit, match=r"error: There is no backbone 'swim'\. Choose one of: "):
        main(["--backbone", "swim"], description="")
    with pytest.raises(SystemExit, match="error: '24 apples' is not a memory size"):
        main(["--longest", "24 apples"], description="")
    with pytest.raises(ValueError, match="at least 1"):
        small(frames=0)
    with pytest.raises(ValueError, match="SlowFast takes a multiple of 4 frames, but got 30"):
        profile(small(backbone="slowfast_50", frames=30))


@pytest.mark.slow
def test_the_script_explains_itself() -> None:
    command = [sys.executable, "pipelines/memory.py", "--help"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for word in (
        "without a GPU",
        "activation checkpointing",
        "--longest",
        "--backbone",
        "thumos_re2",
    ):
        assert word in shown
