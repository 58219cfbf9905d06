"""The frame of `reproduce.py`: what is kept, what is told apart, what the report says."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from pipelines.config.recipes import toy
from pipelines.data.plan import Plan
from pipelines.experiments.accuracy import Accuracy
from pipelines.experiments.classifying import (
    PLAIN,
    REWIRED,
    before_finetuning,
    finetune_backbone,
    finetuned,
    make_clips,
)
from pipelines.experiments.execution import carry_out, execute_here
from pipelines.experiments.experiment import Experiment, Finding, Job, Outcome, Result, Section
from pipelines.experiments.localizing import WAYS, configured, localize, trained_in
from pipelines.experiments.records import Records
from pipelines.experiments.report import Circumstances, chapters, write_report
from pipelines.experiments.settings import parse
from pipelines.experiments.statistics import Measured, at_least
from pipelines.experiments.tal import LARGER, Tal
from pipelines.training.model import build_detector
from re2tal.backbones.swin import TOY_WEIGHTS
from re2tal.datasets.toy import TrimmedToyConfig, make_trimmed_toy

CIRCUMSTANCES = Circumstances(command="python this.py", device="an abacus", commit="abcdef")


@pytest.mark.parametrize(
    ("a", "b", "margin", "expected"),
    [
        ((0.90, 0.91, 0.92), (0.80, 0.81, 0.82), 0.0, True),
        ((0.80, 0.81, 0.82), (0.90, 0.91, 0.92), 0.0, False),
        ((0.80, 0.90, 0.85), (0.90, 0.80, 0.85), 0.0, None),  # chance may have done it
        ((0.80, 0.81, 0.82), (0.81, 0.82, 0.83), 0.02, True),  # worse, but within the margin
        ((0.80, 0.81, 0.82), (0.81, 0.82, 0.83), 0.0, False),
        ((0.9,), (0.1,), 0.0, None),  # one seed tells nothing
    ],
)
def test_two_are_told_apart_by_the_standard_error_of_their_difference(
    a: tuple[float, ...], b: tuple[float, ...], margin: float, *, expected: bool | None
) -> None:
    assert at_least(Measured(values=a), Measured(values=b), margin=margin) is expected


def test_a_measurement_has_the_sample_deviation() -> None:
    found = Measured(values=(0.2, 0.4, 0.9))
    assert found.mean == pytest.approx(0.5)
    assert found.deviation == pytest.approx(torch.tensor(found.values).std().item())
    assert str(found) == "0.500 ± 0.361"


def _square(*, of: int, log: str) -> Result:
    with Path(log).open("a") as file:
        file.write(f"{of}\n")
    if of == 3:
        raise ArithmeticError("three is too much")
    return {"square": of * of}


@dataclass(frozen=True)
class Squares:
    """An experiment that notes what it was asked to do."""

    numbers: tuple[int, ...]
    log: str
    name: str = "squares"

    def prepare(self) -> None:
        Path(self.log).touch()

    def jobs(self) -> Sequence[Job]:
        return [
            Job(name=f"of {n}", work=_square, arguments={"of": n, "log": self.log})
            for n in self.numbers
        ]

    def section(self, results: Mapping[str, Result]) -> Section:
        rows = [{"of": name, "square": result["square"]} for name, result in results.items()]
        figure = Figure()
        figure.subplots().plot([1, 2])
        return Section(
            title="Squares",
            text="Numbers times themselves.",
            findings=[Finding(claim="They grow", holds=True, evidence="see below")],
            tables={"All of them": rows},
            figures={"squares": figure},
        )


def _carried_out(
    tmp_path: Path, experiment: Experiment, *, code: str = "code", resume: bool = True
) -> list[Outcome]:
    records = Records(folder=tmp_path / "results", code=code, device="an abacus")
    return list(carry_out([experiment], execute_here, records, resume=resume))


def _done(experiment: Squares) -> list[str]:
    """What was asked for since the last look."""
    log = Path(experiment.log)
    done = log.read_text().split()
    log.write_text("")
    return done


def test_the_same_command_goes_on_with_what_it_has(tmp_path: Path) -> None:
    experiment = Squares(numbers=(1, 2), log=str(tmp_path / "log"))
    assert [o.result for o in _carried_out(tmp_path, experiment)] == [{"square": 1}, {"square": 4}]
    assert _done(experiment) == ["1", "2"]
    more = replace(experiment, numbers=(1, 2, 4))
    assert [o.result["square"] for o in _carried_out(tmp_path, more)] == [1, 4, 16]
    assert _done(experiment) == ["4"]
    _carried_out(tmp_path, more, resume=False)
    assert _done(experiment) == ["1", "2", "4"]
    _carried_out(tmp_path, more, code="other code")
    assert _done(experiment) == ["1", "2", "4"]


def test_a_failure_is_told_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = Squares(numbers=(2, 3, 4), log=str(tmp_path / "log"))
    outcomes = _carried_out(tmp_path, experiment)
    assert [o.error for o in outcomes] == ["", "ArithmeticError: three is too much", ""]
    assert "of 3: FAILED: ArithmeticError: three is too much" in capsys.readouterr().out
    found = chapters([experiment], outcomes)
    report = write_report(tmp_path, found, CIRCUMSTANCES).read_text()
    assert "- of 3: ArithmeticError: three is too much" in report
    assert [chapter.failed for chapter in found] == [[outcomes[1]]]
    _done(experiment)
    _carried_out(tmp_path, experiment)
    assert _done(experiment) == ["3"]


def test_the_report_has_verdicts_tables_pictures_and_circumstances(tmp_path: Path) -> None:
    experiment = Squares(numbers=(1, 2), log=str(tmp_path / "log"))
    found = chapters([experiment], _carried_out(tmp_path, experiment))
    report = write_report(tmp_path / "out", found, CIRCUMSTANCES).read_text()
    assert "`python this.py`" in report
    assert "an abacus" in report
    assert "| They grow | holds | see below |" in report
    assert "| of 2 | 4 |" in report
    assert "![squares](squares.png)" in report
    assert (tmp_path / "out" / "squares.png").stat().st_size > 1000
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    squares = numbers["experiments"]["squares"]
    assert squares["tables"] == {
        "All of them": [{"of": "of 1", "square": 1}, {"of": "of 2", "square": 4}]
    }
    assert squares["findings"] == [{"claim": "They grow", "holds": True, "evidence": "see below"}]
    assert "an abacus" in numbers["circumstances"]


# Accuracy.


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
    monkeypatch.setattr("pipelines.experiments.classifying.code_fingerprint", lambda: "other")
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
    for way in WAYS:
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
        title = LARGER if larger else WAYS[job.arguments["way"]]
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
    plain = {WAYS["features"]: TOY_WEIGHTS, WAYS["plain"]: TOY_WEIGHTS}
    ours = {WAYS["reversible"]: str(toy_weights), LARGER: str(toy_weights)}
    assert weights(Tal()) == plain | ours
    given = Tal(rewired="mine.safetensors", larger=None)
    assert weights(given) == plain | {WAYS["reversible"]: "mine.safetensors"}
    real = Tal(
        recipes=("thumos_re2_swin_t_actionformer",),
        larger=None,
        options=("--model.weights", "swin3d_t.pth"),
    )
    assert set(weights(real).values()) == {"swin3d_t.pth"}
    real = replace(real, rewired="re2_swin_t.pth")
    assert weights(real)[WAYS["reversible"]] == "re2_swin_t.pth"


def test_larger_frames_are_an_option_of_the_recipe() -> None:
    sizes = {
        job.name: configured("toy", job.arguments["options"]).data.size
        for job in Tal(recipes=("toy",), seeds=(0,), larger=96, options=()).jobs()
    }
    assert [size for name, size in sizes.items() if LARGER in name] == [96]
    assert {size for name, size in sizes.items() if LARGER not in name} == {64}


def test_a_recipe_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'toyy'\. Choose from: toy, toy_vsgn"):
        Tal(recipes=("toyy",))


def test_what_follows_two_dashes_is_for_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    asked = parse(["--only", "tal", "--", "--epochs", "7", "--data.size", "96"], "")
    assert [experiment.name for experiment in asked.experiments] == ["tal"]
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
    for experiment in (Accuracy(), Tal()):
        for job in experiment.jobs():
            assert json.loads(json.dumps(job.arguments)) == job.arguments
