"""Experiments `accuracy`, `tal` and `tunings`: they run, and their verdicts follow the results."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.config.recipes import toy
from pipelines.data.plan import Plan
from pipelines.experiments.accuracy import (
    PLAIN,
    REWIRED,
    Accuracy,
    before_finetuning,
    finetune_backbone,
    finetuned,
    make_clips,
)
from pipelines.experiments.paper import parse
from pipelines.experiments.tal import LARGER, TRAININGS, Tal, configured, localize, trained_in
from pipelines.experiments.tunings import Tunings
from pipelines.training.model import build_detector
from re2tal.backbones.swin import TOY_WEIGHTS
from re2tal.datasets.toy import TrimmedToyConfig, make_trimmed_toy
from re2tal.errors import UserError

CLIPS = TrimmedToyConfig(training=14, validation=14, seconds=3.0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a few toy clips."""
    folder = tmp_path_factory.mktemp("clips")
    make_trimmed_toy(folder, CLIPS)  # in this process, which has imported all that it needs
    make_clips(folder, CLIPS)
    return str(folder)


@pytest.mark.slow
def test_the_shipped_backbone_is_accurate_and_rewiring_alone_loses_it(clips: str) -> None:
    found = before_finetuning(folder=clips)
    assert found[PLAIN] >= 0.8
    assert found[REWIRED] < found[PLAIN]


@pytest.mark.slow
def test_finetuning_starts_from_the_pretrained_network(clips: str) -> None:
    plain = finetuned(kind="plain", epochs=1, seed=0, folder=clips)
    assert plain["top1"] >= 0.7  # after two steps
    scratch = finetuned(kind="scratch", epochs=1, seed=0, folder=clips)
    assert scratch["top1"] < 0.5


@pytest.mark.slow
def test_a_backbone_is_rewired_and_finetuned_once_for_the_same_settings(
    clips: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rewired.safetensors"
    finetune_backbone(path, epochs=1, folder=Path(clips), clips=CLIPS)
    first, made = load_file(path), path.stat().st_mtime_ns
    before = load_file(TOY_WEIGHTS)
    assert first.keys() == before.keys()
    assert any(not torch.equal(first[name], before[name]) for name in first)
    finetune_backbone(path, epochs=1, folder=Path(clips), clips=CLIPS)
    assert path.stat().st_mtime_ns == made
    monkeypatch.setattr("pipelines.experiments.accuracy.code_fingerprint", lambda: "other")
    finetune_backbone(path, epochs=1, folder=Path(clips), clips=CLIPS)
    assert path.stat().st_mtime_ns > made


def _accuracies(experiment: Accuracy, **of_kind: float) -> dict[str, Any]:
    results: dict[str, Any] = {"before finetuning": {PLAIN: 0.98, REWIRED: 0.4}}
    for job in experiment.jobs():
        if job.name not in results:
            shift = 0.001 * job.arguments["seed"]
            results[job.name] = {"top1": of_kind[job.arguments["kind"]] + shift, "seconds": 1.0}
    return results


def test_accuracy_says_what_holds() -> None:
    experiment = Accuracy()
    section = experiment.section(
        _accuracies(experiment, rewired=0.97, moving=0.9, scratch=0.2, plain=0.975)
    )
    assert [finding.holds for finding in section.findings] == [True, True, False, True]
    (rows,) = section.tables.values()
    reached = {row["network"]: row["top-1"] for row in rows}
    assert reached["rewired, finetuned 5 epochs"] == pytest.approx(0.971)
    assert reached[REWIRED] == 0.4
    worse = experiment.section(
        _accuracies(experiment, rewired=0.8, moving=0.9, scratch=0.8, plain=0.975)
    )
    assert [finding.holds for finding in worse.findings] == [False, False, True, False]


# Localization.


def test_ways_differ_in_nothing_but_the_backbone(tiny_plan: Plan) -> None:
    states = {}
    for way in TRAININGS:
        recipe = trained_in(toy(), way, 3)
        torch.manual_seed(recipe.seed)
        detector = build_detector(recipe, tiny_plan.classes, recipe.model.weights)
        states[way] = detector.state_dict()
        trained = {n.split(".")[0] for n, p in detector.named_parameters() if p.requires_grad}
        assert ("backbone" in trained) is (way != "features")
    for way in ("plain", "reversible"):
        assert states[way].keys() == states["features"].keys()
        for name, value in states["features"].items():
            assert torch.equal(states[way][name], value), name


@pytest.mark.slow
def test_a_detector_is_trained_here_and_evaluated(tiny_set: Path) -> None:
    options = (
        "--epochs", "1", "--data.size", "32", "--data.window.frames", "64",
        "--data.annotations", str(tiny_set / "annotations.json"),
        "--data.videos", str(tiny_set / "videos"),
    )  # fmt: skip
    found = localize(recipe="toy", options=options, way="reversible", seed=0)
    assert 0 <= found["mAP"] <= 1
    assert len([name for name in found if name.startswith("mAP/tiou_")]) == 5
    plain = localize(recipe="toy", options=options, way="plain", seed=0)
    assert found["activations_mb"] < plain["activations_mb"]


def _localized(experiment: Tal, reached: Mapping[str, float], larger_mb: float) -> dict[str, Any]:
    results = {}
    for job in experiment.jobs():
        larger = LARGER in job.name
        title = LARGER if larger else TRAININGS[job.arguments["way"]]
        results[job.name] = {
            "mAP": reached[title] + 0.001 * job.arguments["seed"],
            "mAP/tiou_0.50": 0.5,
            "activations_mb": larger_mb if larger else 100.0,
            "seconds": 1.0,
        }
    return results


def test_localization_says_what_holds() -> None:
    experiment = Tal()
    assert len(experiment.jobs()) == 3 * (4 + 3)
    reached = {"features of a frozen backbone": 0.6, "end to end, plain": 0.7}
    reached |= {"end to end, reversible": 0.69, LARGER: 0.75}
    section = experiment.section(_localized(experiment, reached, larger_mb=90.0))
    assert [finding.holds for finding in section.findings] == [True, True, True, True, True]
    assert set(section.tables) == {"Average mAP: toy", "Average mAP: toy_vsgn"}
    # more memory than plain training has is no fair comparison
    unfair = experiment.section(_localized(experiment, reached, larger_mb=110.0))
    assert [finding.holds for finding in unfair.findings] == [True, True, False, True, True]


def test_reversible_training_begins_with_a_rewired_backbone_that_was_finetuned() -> None:
    def weights(experiment: Tal) -> dict[str, str | None]:
        jobs = {
            job.name.split(": ")[1].rsplit(",", 1)[0]: job.arguments for job in experiment.jobs()
        }
        return {
            title: configured(job["recipe"], job["options"]).model.weights
            for title, job in jobs.items()
        }

    toy_weights = Path("data/toy_tal/rewired.safetensors")
    plain = {TRAININGS["features"]: TOY_WEIGHTS, TRAININGS["plain"]: TOY_WEIGHTS}
    ours = {TRAININGS["reversible"]: str(toy_weights), LARGER: str(toy_weights)}
    assert weights(Tal()) == plain | ours
    given = Tal(rewired="mine.safetensors", larger=None)
    assert weights(given) == plain | {TRAININGS["reversible"]: "mine.safetensors"}
    real = Tal(
        recipes=("thumos_re2_swin_t_actionformer",),
        larger=None,
        options=("--model.weights", "swin3d_t.pth"),
    )
    assert set(weights(real).values()) == {"swin3d_t.pth"}
    real = replace(real, rewired="re2_swin_t.pth")
    assert weights(real)[TRAININGS["reversible"]] == "re2_swin_t.pth"


def test_larger_frames_are_an_option_of_the_recipe() -> None:
    sizes = {
        job.name: configured("toy", job.arguments["options"]).data.size
        for job in Tal(recipes=("toy",), seeds=(0,), larger=96, options=()).jobs()
    }
    assert [size for name, size in sizes.items() if LARGER in name] == [96]
    assert {size for name, size in sizes.items() if LARGER not in name} == {64}


def test_a_recipe_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"no recipe toyy\. Choose from: toy, toy_tridet, toy_vsgn"):
        Tal(recipes=("toyy",))


def test_tunings_differ_in_what_learns_and_learning_rates_are_tried_on_another_seed() -> None:
    experiment = Tunings(full_lr=1e-3, adapters_lr=1e-3, lora_lr=2e-4, tried=(2e-4, 1e-3))
    reached = {"full": 0.8, "adapters": 0.79, "lora": 0.5, "frozen": 0.4}
    results, trained = {}, set()
    own = configured("toy_videomae", ["--evaluate-from", "4"])
    for job in experiment.jobs():
        recipe = configured(job.arguments["recipe"], job.arguments["options"])
        tuning, seed, optim = recipe.model.tuning, job.arguments["seed"], recipe.optim
        rate = optim.backbone_lr if tuning == "full" else optim.adapter_lr
        trained.add((tuning, seed, rate))
        found = reached[tuning] + 0.001 * seed
        results[job.name] = {"mAP": found, "activations_mb": 1.0, "trained": 2e3, "seconds": 3.0}
        # nothing else differs
        model = replace(recipe.model, tuning="full")
        optim = replace(optim, adapter_lr=2e-4, backbone_lr=own.optim.backbone_lr)
        assert replace(recipe, model=model, optim=optim) == own
        assert (recipe.optim.backbone_lr == own.optim.backbone_lr) == (tuning != "full")
    rates = {"full": 1e-3, "adapters": 1e-3, "lora": 2e-4, "frozen": 2e-4}
    learning = ("full", "adapters", "lora")
    tries = {(tuning, 7, rate) for tuning in learning for rate in (2e-4, 1e-3)}
    assert trained == {(t, seed, rate) for t, rate in rates.items() for seed in (0, 1, 2)} | tries
    assert len(results) == len(trained)
    section = experiment.section(results)
    assert [finding.holds for finding in section.findings] == [True, True, True, True, False]
    rows, tried = section.tables.values()
    assert [(row["tuning"], row["learning rate"]) for row in rows] == [
        ("full", "0.001"), ("adapters", "0.001"), ("lora", "0.0002"), ("frozen", ""),
    ]  # fmt: skip
    assert rows[0]["average mAP"] == pytest.approx(0.801)
    assert [row["learning rate"] for row in tried] == [2e-4, 1e-3]
    with pytest.raises(UserError, match="no toy recipe thumos_re2_swin_t_actionformer"):
        Tunings(recipe="thumos_re2_swin_t_actionformer")


def test_what_follows_two_dashes_is_for_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    asked = parse(["--only", "tal", "--", "--epochs", "7", "--data.size", "96"], "")
    assert list(asked.experiments) == ["tal"]
    assert asked.tal.options == ("--epochs", "7", "--data.size", "96")
    options = asked.tal.jobs()[0].arguments["options"]
    assert options[-4:] == ["--epochs", "7", "--data.size", "96"]
    assert options[:2] == ["--data.annotations", "data/toy_tal/annotations.json"]
    own = parse(["--", "--data.annotations", "mine.json", "--data.videos", "mine"], "").tal
    assert own.jobs()[0].arguments["options"] == list(own.options)
    assert parse(["--quick"], "").tal.seeds == (0,)
    wrong = parse(["--", "--epoch", "7"], "")
    with pytest.raises(SystemExit):
        wrong.tal.jobs()
    assert "--epoch" in capsys.readouterr().err


def test_other_recipes_are_left_to_ray_train() -> None:
    recipes = ("toy", "thumos_re2_swin_t_actionformer")
    jobs = Tal(recipes=recipes, larger=None, options=()).jobs()
    assert {(job.arguments["recipe"], job.alone, job.spreads) for job in jobs} == {
        ("toy", False, False),
        ("thumos_re2_swin_t_actionformer", True, True),
    }


def test_arguments_are_json() -> None:
    for experiment in (Accuracy(), Tal(), Tunings()):
        for job in experiment.jobs():
            assert json.loads(json.dumps(job.arguments)) == job.arguments
