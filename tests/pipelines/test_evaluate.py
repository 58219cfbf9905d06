"""Script that evaluates detections and detectors against annotations."""

import io
import json
import runpy
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import re2tal
from pipelines.config.recipe import Recipe
from pipelines.config.recipes import toy
from pipelines.core.tables import read_csv
from pipelines.core.tracking import Run
from pipelines.evaluate import parse
from pipelines.inference.evaluation import evaluate_run, evaluated_plan, read_labelled
from pipelines.inference.report import evaluate, logged
from pipelines.training.model import spec_of
from re2tal.datasets import DATASETS
from re2tal.detection.evaluation import METRICS, Compared, Row
from re2tal.detection.files import read_detections
from re2tal.detection.raw import write_raw
from re2tal.detection.segments import Detections
from re2tal.errors import UserError
from re2tal.trained import save_detector
from tests.pipelines.scripts import run_here

SCRIPT = Path(__file__).parents[2] / "pipelines" / "evaluate.py"

# Of "jump" one of two instances is found, with the best score; "spin" is found, after an error.
DATABASE: dict[str, Any] = {
    "a": {"subset": "validation", "segments": [(1.0, 3.0, "jump"), (5.0, 9.0, "spin")]},
    "b": {"subset": "validation", "segments": [(2.0, 4.0, "jump")]},
    "c": {"subset": "training", "segments": [(0.0, 2.0, "spin")]},
    "d": {"subset": "testing", "segments": []},
}
CLASSES = ("jump", "spin")
FOUND = {
    "a": [(1.0, 3.0, 0.9, "jump"), (5.0, 9.0, 0.6, "spin"), (0.0, 1.0, 0.8, "spin")],
    "c": [(0.0, 2.0, 0.99, "spin")],
}


def row(segment: tuple[float, float, float, str]) -> dict[str, Any]:
    start, end, score, label = segment
    return {"segment": [start, end], "score": score, "label": label}


def write(folder: Path, found: Mapping[str, list[Any]], *options: str) -> list[str]:
    """Write annotations and detections, and return the options that name them."""
    database = {
        name: {
            "subset": video["subset"],
            "duration": 10.0,
            "annotations": [
                {"segment": [start, end], "label": label} for start, end, label in video["segments"]
            ],
        }
        for name, video in DATABASE.items()
    }
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    return write_found(folder, found, *options)


def write_found(folder: Path, found: Mapping[str, list[Any]], *options: str) -> list[str]:
    results = {name: [row(segment) for segment in of_video] for name, of_video in found.items()}
    (folder / "detections.json").write_text(json.dumps({"results": results}))
    named = {"detections": "detections.json", "annotations": "annotations.json"}
    named |= {"output": "out", "runs": "runs"}
    places = [text for name, file in named.items() for text in (f"--{name}", str(folder / file))]
    return [*places, *options]


def metrics(run: Run) -> dict[str, float]:
    return dict(run.client.get_run(run.run_id).data.metrics)


def artifacts(run: Run, folder: str | None = None) -> set[str]:
    return {file.path for file in run.client.list_artifacts(run.run_id, folder)}


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path, str]:
    """MLflow run of an evaluation, the folder of its files, and its output."""
    folder = tmp_path_factory.mktemp("evaluated")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run = evaluate_run(parse(write(folder, FOUND, "--thresholds", "0.5", "0.7")))
    return run, folder / "out", printed.getvalue()


def test_detections_are_evaluated_and_logged(evaluated: tuple[Run, Path, str]) -> None:
    run, output, _ = evaluated
    logged = metrics(run)
    assert logged["val/mAP"] == logged["val/mAP/tiou_0.70"] == pytest.approx(0.5)
    assert logged["val/AP/jump"] == logged["val/AP/spin"] == pytest.approx(0.5)
    assert logged["val/AR/10"] == pytest.approx(2 / 3)
    assert logged["diagnosis/missed"] == pytest.approx(1 / 3)
    info = run.client.get_run(run.run_id)
    assert info.info.status == "FINISHED"
    assert info.data.params["thresholds"] == "(0.5, 0.7)"
    assert len(info.data.tags["data.fingerprint"]) == 64
    kinds = ("false_positives", "sensitivity", "false_negatives")
    pictures = {"timelines", *(f"diagnosis_{kind}" for kind in kinds)}
    assert artifacts(run, "pictures") == {f"pictures/{name}.png" for name in pictures}
    files = {path.name for path in output.iterdir() if path.is_file()}
    assert artifacts(run) == {*files, "pictures", "remarks.txt"}


def test_what_was_found_is_printed(evaluated: tuple[Run, Path, str]) -> None:
    printed = evaluated[2]
    assert "detections of 1 video outside the subset are left out" in printed
    assert "no detections in 1 video of the subset (b)" in printed
    assert "AR@1 0.333" in printed
    assert "instances missed     33.3%" in printed
    (jump,) = [line for line in printed.splitlines() if "jump" in line]
    cells = [cell.strip() for cell in jump.split("│")[1:-1]]
    assert cells == ["jump", "2", "0.500", "0.500", "0.500"]


def test_tables_are_written_for_people_and_programs(evaluated: tuple[Run, Path, str]) -> None:
    output = evaluated[1]
    content = json.loads((output / "evaluation.json").read_text())
    whole = {"average": 0.5, "tIoU 0.50": 0.5, "tIoU 0.70": 0.5}
    assert content["tables"]["average_precision"] == [
        {"class": "jump", "instances": 2} | whole,
        {"class": "spin", "instances": 1} | whole,
        {"class": "mAP", "instances": 3} | whole,
    ]
    assert len(content["tables"]["average_recall"]) == 100
    for name, rows in content["tables"].items():
        read = read_csv(output / f"{name}.csv")
        assert read == [{k: "" if v is None else str(v) for k, v in one.items()} for one in rows]
    assert content["metrics"]["val/mAP"] == 0.5


def test_classes_are_no_formulas_in_the_tables(tmp_path: Path) -> None:
    arguments = write(tmp_path, FOUND)
    for name in ("annotations.json", "detections.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace('"jump"', '"=1+1"'))
    evaluate_run(parse(arguments))
    table = tmp_path / "out" / "average_precision.csv"
    assert table.read_text().splitlines()[1].startswith("'=1+1,2,")
    assert [row["class"] for row in read_csv(table)] == ["=1+1", "spin", "mAP"]


PROPOSALS = {name: [(*one[:3], "action") for one in rows] for name, rows in FOUND.items()}


def evaluation(
    folder: Path, *options: str, found: Mapping[str, list[Any]] = PROPOSALS
) -> dict[str, float]:
    """Return the metrics of detections, without MLflow."""
    config = parse(write(folder, found, *options))
    paths = [Path(place) for place in config.detections]
    labelled = read_labelled(paths, evaluated_plan(config), config)
    return logged(
        evaluate(
            labelled,
            config.levels,
            ks=config.ks,
            bins=config.record.bins,
            ignore_ambiguous=False,
        )
    )


class Count:
    """Metric as a user would add it: the number of detections."""

    def __init__(self, compared: Compared) -> None:
        self.value = float(sum(len(one.scores) for one in compared.predictions.values()))

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        return {f"count/{names[-1]}": self.value}

    def rows(self, classes: Sequence[str]) -> list[Row]:
        return [{"class": classes[-1], "count": self.value}]

    def lines(self) -> Iterator[str]:
        yield f"number of detections {self.value}"


def test_one_entry_of_the_table_makes_a_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METRICS, "counts", Count)
    run = evaluate_run(parse(write(tmp_path, FOUND)))
    number = sum(len(rows) for name, rows in FOUND.items() if name == "a")
    assert metrics(run)["val/count/spin"] == number
    assert f"number of detections {float(number)}" in capsys.readouterr().out
    assert (tmp_path / "out" / "counts.csv").read_text().split() == [
        "class,count",
        f"spin,{float(number)}",
    ]


def test_proposals_are_evaluated_whatever_the_class(tmp_path: Path) -> None:
    found = evaluation(tmp_path)
    # of three instances two are found, at ranks 1 and 3
    assert found["val/mAP"] == found["val/AP/action"] == pytest.approx((1 + 2 / 3) / 3)
    assert "val/AP/jump" not in found


def test_detections_are_found_in_every_normal_form_of_their_videos_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = evaluation(tmp_path)
    monkeypatch.setitem(DATABASE, "caf\u00e9", DATABASE["a"])
    monkeypatch.delitem(DATABASE, "a")
    renamed = {"cafe\u0301": PROPOSALS["a"], "c": PROPOSALS["c"]}
    again = evaluation(tmp_path, found=renamed)
    assert again == found
    assert again["val/mAP"] > 0


def test_video_scores_give_proposals_their_classes(tmp_path: Path) -> None:
    scores = {"class": ["jump", "spin"], "results": {"a": [0.9, 0.1], "b": [0.9, 0.1]}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    options = ("--video-scores", str(tmp_path / "scores.json"), "--video-scores-top", "1")
    found = evaluation(tmp_path, *options)
    assert found["val/AP/jump"] == pytest.approx(0.5)
    assert found["val/AP/spin"] == 0
    assert found["val/AR/10"] == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="have classes already: leave the scores out"):
        evaluate_run(parse(write(tmp_path, FOUND, *options)))
    scores["results"] = {"e": [0.9, 0.1]}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(UserError, match=r"The ids there are e; those of the annotations are a, b"):
        evaluation(tmp_path, *options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--model", "x"), "either --detections FILE or --model MODEL"),
        (("--thresholds", "0.5", "1.5"), "Correct --thresholds"),
        (("--subset", "testing"), r"its 1 videos have none. Name a subset .*\(--subset\)"),
        (("--annotations", "nowhere.json"), "nothing at .*nowhere.json. Correct --annotations"),
        (("--detections", "nowhere.json"), "nothing at .*nowhere.json. Correct --detections"),
        (("--video-scores", "nowhere.json"), "Correct --video-scores"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_run_starts(
    tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        evaluate_run(parse(write(tmp_path, FOUND, *options)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("swim", r"video 'a'\[1\].label: is not a known class \(found 'swim'\)"),
        ("action", "1 of the 2 detections in .* are proposals"),
    ],
)
def test_detections_of_other_classes_are_refused(tmp_path: Path, label: str, reason: str) -> None:
    found = {"a": [FOUND["a"][0], (5.0, 6.0, 0.5, label)]}
    with pytest.raises(UserError, match=reason):
        evaluate_run(parse(write(tmp_path, found)))


def test_the_script_evaluates(tmp_path: Path) -> None:
    given = write(tmp_path, FOUND)
    before = {path.name for path in tmp_path.iterdir()}
    places = given[: given.index("--output")]  # results lie where they do by default
    printed = run_here(SCRIPT, *places, folder=tmp_path)
    assert "average recall" in printed
    assert "MLflow run" in printed
    assert {path.name for path in tmp_path.iterdir()} == before | {"runs"}
    assert (tmp_path / "runs" / "evaluation" / "evaluation.json").exists()


def test_the_script_ends_with_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = write(tmp_path, FOUND, "--subset", "none")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit, match=r"^error: "):
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_a_detector_detects_in_the_subset_and_is_evaluated(
    tiny_recipe: Recipe, tiny_set: Path, tmp_path: Path
) -> None:
    database = json.loads((tiny_set / "annotations.json").read_text())["database"]
    classes = tuple(sorted({i["label"] for v in database.values() for i in v["annotations"]}))
    whole, damaged = sorted(n for n, v in database.items() if v["subset"] == "validation")
    shutil.copytree(tiny_set, tmp_path / "set")
    (tmp_path / "set" / "videos" / f"{damaged}.mp4").write_text("this is no video")
    spec = spec_of(tiny_recipe, classes)
    torch.manual_seed(0)
    save_detector(tmp_path / "model" / "detector", spec, spec.build())

    def evaluated_run(*options: str) -> Run:
        places = {"annotations": "set/annotations.json", "output": "out", "runs": "runs"}
        named = [text for n, file in places.items() for text in (f"--{n}", str(tmp_path / file))]
        return evaluate_run(parse([*named, "--thresholds", "0.1", *options]))

    source = ("--model", str(tmp_path / "model"), "--videos", str(tmp_path / "set" / "videos"))
    with pytest.raises(UserError, match=r"1 of 2 videos cannot be used.* \(--max-failed\)"):
        evaluated_run(*source, "--actors", "1")
    run = evaluated_run(*source, "--actors", "1", "--max-failed", "0.5")
    found = read_detections(tmp_path / "out" / "detections.json", classes)
    assert list(found) == [whole]
    wanted = re2tal.detect(tiny_set / "videos" / f"{whole}.mp4", tmp_path / "model").detections
    assert len(wanted) > 0
    torch.testing.assert_close(found[whole].scores.float(), wanted.scores, rtol=1e-5, atol=1e-6)
    remarks = run.client.download_artifacts(run.run_id, "remarks.txt", str(tmp_path))
    assert f"{damaged} is left out: " in Path(remarks).read_text()
    assert judged(run) == {i["label"] for i in database[whole]["annotations"]}
    # its detections are in MLflow, where they can be evaluated again; there the video counts
    again = evaluated_run("--detections", f"runs:/{run.run_id}/detections.json")
    both = [i for name in (whole, damaged) for i in database[name]["annotations"]]
    assert judged(again) == {i["label"] for i in both} != judged(run)


def judged(run: Run) -> set[str]:
    """Return the classes that have annotated instances."""
    return {name.removeprefix("val/AP/") for name in metrics(run) if name.startswith("val/AP/")}


def test_a_detector_of_other_classes_is_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    spec = spec_of(tiny_recipe, ("jump", "swim"))
    save_detector(tmp_path / "model", spec, spec.build())
    arguments = [
        *write(tmp_path, {}),
        "--model",
        str(tmp_path / "model"),
        "--videos",
        str(tmp_path),
    ]
    del arguments[:2]  # the detections
    with pytest.raises(UserError, match=r"1 of the 2 classes of the detector .* \(swim\)"):
        evaluate_run(parse(arguments))


def test_thresholds_subset_and_recall_are_those_of_the_data_set() -> None:
    assert parse([]).levels == toy().thresholds
    for name, record in DATASETS.items():
        config = parse(["--dataset", name])
        assert (config.levels, config.ks) == (record.thresholds, record.recall_at)
        assert config.evaluated_on == record.validation
    assert parse(["--dataset", "hacs-segments"]).levels == pytest.approx(
        [0.5 + 0.05 * i for i in range(10)]
    )
    own = parse(["--dataset", "ego4d-mq", "--thresholds", "0.5", "--subset", "x", "--recall-at"])
    assert (own.levels, own.evaluated_on, own.ks) == ((0.5,), "x", ())


def test_recall_of_as_many_detections_as_instances(tmp_path: Path) -> None:
    # of spin's one instance the second best detection finds it, of jump's two one is found
    found = evaluation(tmp_path, "--recall-at", "1", "2", "--thresholds", "0.5", found=FOUND)
    assert found["val/recall_1x"] == found["val/recall_1x/tiou_0.50"] == pytest.approx(0.25)
    assert found["val/recall_2x/tiou_0.50"] == pytest.approx(0.75)
    with pytest.raises(UserError, match="--recall-at"):
        evaluate_run(parse(write(tmp_path, FOUND, "--recall-at", "0")))


def test_ego4d_is_reported_by_recall_at_1x(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {})
    annotations = tmp_path / "annotations.json"
    annotations.write_text(annotations.read_text().replace('"validation"', '"val"'))
    run = evaluate_run(parse(write_found(tmp_path, FOUND, "--dataset", "ego4d-mq")))
    assert metrics(run)["val/recall_1x/tiou_0.50"] == pytest.approx(0.25)
    assert "recall@1x            tIoU 0.10 0.250" in capsys.readouterr().out
    tables = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tables"]
    assert [row["class"] for row in tables["instance_recall"]] == ["jump", "spin", "mean"]
    assert tables["instance_recall"][-1]["average"] == pytest.approx(0.25)


def raw(path: Path, found: Mapping[str, list[Any]], classes: tuple[str, ...]) -> str:
    path.parent.mkdir()
    videos = {
        name: Detections(
            segments=torch.tensor([one[:2] for one in of_video]).reshape(-1, 2),
            scores=torch.tensor([float(one[2]) for one in of_video]),
            labels=torch.tensor([classes.index(one[3]) for one in of_video], dtype=torch.int64),
        )
        for name, of_video in found.items()
    }
    write_raw(path, videos, classes)
    return str(path)


def test_raw_detections_of_runs_become_an_ensemble(tmp_path: Path) -> None:
    # each run finds another instance of jump; their files have one name and other class numbers
    other = {"a": [(7.0, 8.0, 0.4, "jump")], "b": [(2.0, 4.0, 0.9, "jump")], "z": []}
    first = raw(tmp_path / "1" / "raw.safetensors", {"b": [], **FOUND}, ("jump", "spin"))
    second = raw(tmp_path / "2" / "raw.safetensors", other, ("spin", "jump"))

    def ap(*options: str) -> float:
        arguments = ["--thresholds", "0.5", "--nms.method", "hard", *options]
        return evaluation(tmp_path, *arguments, found=FOUND)["val/AP/jump"]

    assert ap("--detections", first) == ap("--detections", second) == pytest.approx(0.5)
    assert ap("--detections", first, second) == pytest.approx(1.0)
    # weights of 1 to 999 leave 0.0009 of the first run's best score, which still counts
    light = ap("--detections", first, second, "--weights", "1", "999")
    assert light == pytest.approx((1 + 2 / 3) / 2)
    for options, reason in (
        (("--weights", "1"), "2 runs and 1 weights.*Correct --detections or --weights"),
        (("--weights", "1", "0"), "must be above 0"),
    ):
        with pytest.raises(UserError, match=reason):
            ap("--detections", first, second, *options)
    with pytest.raises(UserError, match=r"detections\.json holds detections after it"):
        ap("--detections", first, str(tmp_path / "detections.json"))
    lacking = raw(tmp_path / "3" / "raw.safetensors", {"a": []}, ("jump", "spin"))
    with pytest.raises(UserError, match="run 1 lacks b"):
        ap("--detections", first, lacking)
    swim = raw(tmp_path / "4" / "raw.safetensors", {"a": []}, ("swim",))
    with pytest.raises(UserError, match=r"1 of the 1 classes of .* \(swim\).*--detections"):
        ap("--detections", swim)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (
            ("v_a", "v_b"),
            (
                r"None of the 2 videos of .*detections\.json is in the subset 'validation' of "
                r".*annotations\.json.*The ids there are v_a, v_b; those of the annotations are "
                r'a, b\. Without "v_" in front they have some in common'
            ),
        ),
        (("c",), r"None of the 1 videos.* The ids there are c; .* --subset"),
        (tuple("efghi"), r"The ids there are e, f, g, \.\.\. and 2 more; those of"),
        ((), r"None of the 0 videos .* The ids there are none;"),
    ],
    ids=["prefix", "other subset", "others", "nothing"],
)
@pytest.mark.parametrize("kind", ["json", "raw"])
def test_detections_of_no_evaluated_video_are_refused(
    tmp_path: Path, ids: tuple[str, ...], reason: str, kind: str
) -> None:
    found = dict.fromkeys(ids, FOUND["a"])
    arguments = write(tmp_path, found)
    if kind == "raw":
        arguments += ["--detections", raw(tmp_path / "1" / "raw.safetensors", found, CLASSES)]
        reason = reason.replace(r"detections\.json", r"raw\.safetensors")
    with pytest.raises(UserError, match=reason):
        evaluate_run(parse(arguments))


def test_detections_of_few_evaluated_videos_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = write(tmp_path, FOUND)
    path = tmp_path / "annotations.json"
    content = json.loads(path.read_text())
    content["database"]["e"] = content["database"]["b"]  # a third one, of which one is found
    path.write_text(json.dumps(content))
    run = evaluate_run(parse(arguments))
    warning = "warning: only 1 of the 3 videos of the subset 'validation' have detections"
    printed = capsys.readouterr().out.splitlines()
    (place,) = [number for number, line in enumerate(printed) if line.startswith(warning)]
    assert "detections.json" in printed[place + 1]  # the title of the table, which may be wrapped
    remarks = run.client.download_artifacts(run.run_id, "remarks.txt", str(tmp_path))
    assert warning.removeprefix("warning: ") in Path(remarks).read_text()
