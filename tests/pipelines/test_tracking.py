"""MLflow store: complete configuration, batched metrics, correct final states, nothing lost."""

import json
import shlex
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import RunStatus
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import _validate_metric
from optuna.storages import RDBStorage

from pipelines.config.recipes import toy
from pipelines.core.checkout import git_commit
from pipelines.core.metric_log import MetricLogger, last_steps, log_metrics
from pipelines.core.metric_names import safe_names, safe_path
from pipelines.core.storage import absolute, database_file, database_url, fetch
from pipelines.core.tracking import (
    Run,
    finishing,
    flatten,
    log_dataset,
    log_text,
    start_run,
    tracking_uri,
)
from pipelines.training.validation import metrics_of
from re2tal.detection.evaluation import MapResult
from re2tal.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    steps: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    name: str = "small"
    experiment: str = "tests"
    inner: Inner = field(default_factory=Inner)
    part: object = field(default_factory=Inner)  # as a localizer is: one of several classes


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one store for all tests, since creating its tables takes seconds."""
    return tmp_path_factory.mktemp("store") / "runs"


@pytest.fixture
def run(output: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return start_run(Outer(), output=output)


def test_flatten_names_every_leaf() -> None:
    assert dict(flatten(Outer())) == {
        "name": "small",
        "experiment": "tests",
        "inner.rate": 0.1,
        "inner.steps": (1, 2),
        "part": "Inner",
        "part.rate": 0.1,
        "part.steps": (1, 2),
    }


def test_a_run_holds_its_configuration_and_versions(run: Run, output: Path) -> None:
    found = run.client.get_run(run.run_id)
    assert found.data.params == {k: str(v) for k, v in flatten(Outer())}
    assert found.data.tags["version.torch"]
    assert found.info.run_name.startswith("small-")
    assert found.info.artifact_uri.startswith((output / "artifacts").as_uri())
    assert (output / "mlflow.db").is_file()


def test_a_run_says_who_made_it_from_what_and_how_to_repeat_it(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("sys.argv", ["pipelines/train.py", "toy", "--data.videos", "my videos"])
    monkeypatch.setattr("pipelines.core.checkout.subprocess.run", _no_git)
    monkeypatch.setenv("RE2TAL_GIT_COMMIT", "12ab" * 10)
    for job in (False, True):
        if job:
            monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        run = start_run(Outer(), output=output)
        tags = run.client.get_run(run.run_id).data.tags
        assert tags["mlflow.source.type"] == ("JOB" if job else "LOCAL")
        assert tags["mlflow.source.name"] == "pipelines/train.py"
        assert tags["mlflow.source.git.commit"] == "12ab" * 10
        command = tags["mlflow.note.content"].split("    ")[1]
        python, *words = shlex.split(command)  # as it runs in this folder
        assert (Path.cwd() / python).samefile(sys.executable)
        assert words == ["pipelines/train.py", "toy", "--data.videos", "my videos"]
        assert tags["mlflow.user"]
    # a trial of a sweep is started by a Ray worker, whose own command repeats nothing
    monkeypatch.setattr("sys.argv", ["/ray/default_worker.py", "--node-id=1"])
    trial = start_run(Outer(), output=output, tags={"mlflow.parentRunId": run.run_id})
    of_trial = trial.client.get_run(trial.run_id).data.tags
    for name in ("mlflow.note.content", "mlflow.source.name", "mlflow.source.type"):
        assert of_trial[name] == tags[name]
    experiment = run.client.get_experiment(run.client.get_run(run.run_id).info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def _no_git(*command: Any, **options: Any) -> NoReturn:
    raise FileNotFoundError("git")


def test_what_a_run_on_features_does_not_use_is_no_parameter(output: Path) -> None:
    base = toy()
    recipe = replace(base, data=replace(base.data, features="f"))
    with_frames, without = (
        run.client.get_run(run.run_id).data.params
        for run in (start_run(one, output=output) for one in (base, recipe))
    )
    dropped = with_frames.keys() - without.keys()
    assert {"data.videos", "data.size", "data.augmentation.flip", "optim.backbone_lr"} <= dropped
    assert {"model.weights", "model.tuning", "model.adapters.ratio", "model.lora.rank"} <= dropped
    assert {"data.features", "data.window.frames", "optim.localizer_lr"} <= without.keys()
    assert {"data.augmentation.speed", "data.augmentation.reverse"} <= without.keys()


# signs that mean something in URLs; `%41` is an A there
SPECIAL = ("a%41b", "100%", "a?b=c", "a#b", "%2F..", "ä 日本+&;'")


@pytest.mark.parametrize("name", SPECIAL)
def test_a_store_lies_in_its_output_whatever_that_is_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)  # the name is the working directory's too
    run = start_run(Outer(), output=absolute("runs"))
    log_metrics(run, {"train/loss": 0.5}, step=1)
    log_text(run, ["hello"], "notes/a.txt")
    runs = Path("runs").absolute()
    study = optuna.create_study(storage=RDBStorage(database_url(runs / "optuna.db")))
    study.tell(study.ask(), 0.5)
    assert [made.name for made in tmp_path.iterdir()] == [name]
    assert [made.name for made in runs.parent.iterdir()] == ["runs"]
    assert {"mlflow.db", "optuna.db", "artifacts"} <= {made.name for made in runs.iterdir()}
    assert database_file(run.uri) == tmp_path / name / "runs" / "mlflow.db"
    found = Run(uri=tracking_uri(absolute("runs")), run_id=run.run_id)
    assert found.client.get_run(run.run_id).data.metrics == {"train/loss": 0.5}
    uri = f"runs:/{run.run_id}/notes/a.txt"
    text = fetch(uri, tmp_path, tracking_uri=found.uri, what="The text").read_text()
    assert text == "hello\n"


def test_a_data_base_that_is_no_file_has_none() -> None:
    for url in ("postgresql://a@b/c", "http://host:5000", "sqlite://", ""):
        assert database_file(url) is None
    assert database_file("sqlite:///mlflow.db?timeout=5") == Path("mlflow.db")


def test_the_server_in_the_environment_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert start_run(Outer(), output=tmp_path / "runs").uri == uri
    assert not (tmp_path / "runs" / "mlflow.db").exists()
    assert start_run(Outer(), output="s3://bucket/runs").uri == uri


def test_an_object_store_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"s3://bucket/runs .*MLFLOW_TRACKING_URI"):
        start_run(Outer(), output="s3://bucket/runs")


def test_metrics_arrive_whole_and_in_order(run: Run, tmp_path: Path) -> None:
    logger = MetricLogger(run, fallback=tmp_path / "unsent.jsonl", interval=0.01)
    for step in range(1500):  # more than one request may hold
        logger.log({"train/loss": float(step)}, step=step)
    assert logger.close() == 0
    history = run.client.get_metric_history(run.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(i, float(i)) for i in range(1500)]
    assert not (tmp_path / "unsent.jsonl").exists()


def test_what_was_logged_is_in_the_store_after_a_flush(run: Run, tmp_path: Path) -> None:
    logger = MetricLogger(run, fallback=tmp_path / "unsent.jsonl", interval=600)
    for step in range(3):
        logger.log({"train/loss": float(step)}, step=step)
        logger.flush()
        history = run.client.get_metric_history(run.run_id, "train/loss")
        assert [m.step for m in history] == list(range(step + 1))
    assert logger.close() == 0


def test_a_flush_waits_no_longer_than_it_is_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *args, **kwargs: answer.wait(60))
    logger = MetricLogger(run, fallback=tmp_path / "unsent.jsonl", interval=600)
    logger.log({"train/loss": 1.0}, step=1)
    logger.flush(timeout=0.05)
    assert not answer.is_set()  # the store has not answered yet, and the step goes on
    answer.set()
    assert logger.close() == 0


def test_metrics_that_cannot_be_sent_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    dead = Run(uri="http://127.0.0.1:9", run_id="none")
    logger = MetricLogger(dead, fallback=tmp_path / "unsent.jsonl", interval=60)
    logger.log({"a": 1.0, "b": 2.0}, step=7)
    assert logger.close() == 2
    lines = [json.loads(line) for line in (tmp_path / "unsent.jsonl").read_text().splitlines()]
    assert [(line["key"], line["value"], line["step"]) for line in lines] == [
        ("a", 1.0, 7),
        ("b", 2.0, 7),
    ]


# As Ego4D's Moment Queries name their classes; the last is not theirs, and as MLflow would take it.
EGO4D = (
    "wash_hands",
    "put_away_(or_take_out)_dishes_/_utensils_in_storage",
    "cut_/_chop_/_slice_a_vegetable,_fruit,_or_meat",
    "turn-on_/_light_the_stove_burner",
    "put_away__or_take_out__dishes___utensils_in_storage",
)


def test_classes_of_any_name_have_their_average_precision(run: Run, tmp_path: Path) -> None:
    per_class = np.array([[0.1, 0.2, 0.3, np.nan, 0.5]])
    mean = float(np.nanmean(per_class))
    result = MapResult(
        thresholds=np.array([0.5]),
        per_class=per_class,
        instances=np.array([1, 1, 1, 0, 1]),
        mAP=np.array([mean]),
        average=mean,
    )
    logger = MetricLogger(run, fallback=tmp_path / "unsent.jsonl", interval=60)
    logger.log(metrics_of({"average_precision": result}, EGO4D), step=1)
    logger.log({"train/loss": 0.5}, step=2)
    assert logger.close() == 0
    found = run.client.get_run(run.run_id).data.metrics
    assert found.pop("train/loss") == 0.5
    assert found.pop("val/mAP") == found.pop("val/mAP/tiou_0.50") == mean
    assert found == {
        "val/AP/wash_hands": 0.1,
        "val/AP/put_away__or_take_out__dishes___utensils_in_storage_2": 0.2,
        "val/AP/cut___chop___slice_a_vegetable__fruit__or_meat": 0.3,
        "val/AP/put_away__or_take_out__dishes___utensils_in_storage": 0.5,
    }


@given(st.lists(st.text(max_size=300), unique=True, max_size=8))
def test_safe_names_are_different_and_taken_by_mlflow(names: list[str]) -> None:
    safe = safe_names(names)
    assert len(set(safe)) == len(names)
    for name in safe:
        _validate_metric(f"val/AP/{name}", 0.5, timestamp=1, step=1)


@given(st.text(max_size=100))
def test_groups_of_a_name_stay(name: str) -> None:
    safe = safe_path(f"accuracy/{name}/a, b")
    assert safe.startswith("accuracy/")
    assert safe.endswith("/a_ b")
    _validate_metric(safe, 0.5, timestamp=1, step=1)


def test_a_metric_that_is_refused_keeps_no_other_back(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = MetricLogger(run, fallback=tmp_path / "unsent.jsonl", interval=60)
    for step in range(40):
        logger.log({"train/loss": float(step)}, step=step)
        if step in {0, 17, 18, 39}:
            logger.log({"cut, (chop)": 1.0}, step=step)
    assert logger.close() == 4
    history = run.client.get_metric_history(run.run_id, "train/loss")
    assert sorted(m.value for m in history) == [float(step) for step in range(40)]
    lines = [json.loads(line) for line in (tmp_path / "unsent.jsonl").read_text().splitlines()]
    assert [(line["key"], line["step"]) for line in lines] == [
        ("cut, (chop)", step) for step in (0, 17, 18, 39)
    ]
    (record,) = caplog.records
    assert "refuses the metric 'cut, (chop)'" in record.getMessage()


def _status(run: Run) -> str:
    return RunStatus.to_string(RunStatus.from_string(run.client.get_run(run.run_id).info.status))


def test_a_run_that_ends_is_finished(run: Run) -> None:
    with finishing(run):
        pass
    assert _status(run) == "FINISHED"


def test_a_run_that_fails_keeps_the_reason(run: Run) -> None:
    with pytest.raises(ValueError), finishing(run):
        raise ValueError("the disk is full")
    assert _status(run) == "FAILED"
    assert run.client.get_run(run.run_id).data.tags["error"] == "ValueError: the disk is full"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_a_run_that_is_stopped_is_killed_and_has_no_error(run: Run, stop: BaseException) -> None:
    with pytest.raises(type(stop)), finishing(run):
        raise stop
    assert _status(run) == "KILLED"
    assert "error" not in run.client.get_run(run.run_id).data.tags


def test_what_is_logged_already_is_not_logged_again(run: Run) -> None:
    log_metrics(run, {"memory/mb": 3.0, "val/mAP": 0.5}, step=4)
    log_metrics(run, {"val/mAP": 0.25}, step=2)  # out of order: the last step counts
    assert last_steps(run) == {"memory/mb": 4, "val/mAP": 4}
    log_metrics(run, {"memory/mb": 3.0, "val/mAP": 0.5, "best": 1.0}, step=4, again=False)
    log_metrics(run, {"val/mAP": 0.75}, step=5, again=False)
    steps = {
        name: sorted(m.step for m in run.client.get_metric_history(run.run_id, name))
        for name in last_steps(run)
    }
    assert steps == {"memory/mb": [4], "val/mAP": [2, 4, 5], "best": [4]}


def test_the_data_set_is_an_input(run: Run) -> None:
    subsets = {"training": "toy a", "validation": "toy b"}
    log_dataset(run, source="/data/a.json", digest="ab" * 32, subsets=subsets)
    inputs = run.client.get_run(run.run_id).inputs
    assert inputs is not None
    given = inputs.dataset_inputs
    assert {item.tags[0].value: item.dataset.name for item in given} == subsets
    assert {json.loads(item.dataset.source)["uri"] for item in given} == {"/data/a.json"}
    assert run.client.get_run(run.run_id).data.tags["data.fingerprint"] == "ab" * 32


def test_the_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    here = git_commit(Path(__file__).parent)
    assert here is None or len(here.removesuffix("-dirty")) == 40
