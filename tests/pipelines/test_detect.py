"""Script that detects in new videos, as a user runs it, and its second run."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from mlflow.tracking import MlflowClient

import pipelines.inference.run as script
import re2tal
from pipelines.core.models import fingerprint, local_detector
from pipelines.core.tables import read_csv
from pipelines.core.tracking import Run, start_run
from pipelines.detect import parse
from pipelines.inference.options import DetectConfig
from pipelines.inference.output import OutputConfig
from pipelines.training.results import log_model
from re2tal.backbones.swin import swin_toy
from re2tal.detection.files import read_detections
from re2tal.errors import UserError
from re2tal.localizers import ActionFormerConfig
from re2tal.trained import DetectorSpec, save_detector
from re2tal.videos.windows import WindowConfig
from tests.pipelines.output_files import Page

SCRIPT = Path(__file__).parents[2] / "pipelines" / "detect.py"
CLASSES = ("bounce", "orbit", "pulse")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Folder with a saved detector, an MLflow run that has it, two videos and a text file."""

    folder: Path
    run: Run

    @property
    def detector(self) -> Path:
        return self.folder / "checkpoint" / "detector"

    def config(self, **changes: object) -> DetectConfig:
        config = DetectConfig(
            videos=(str(self.folder / "videos"),),
            model=str(self.folder / "checkpoint"),
            output=str(self.folder / "found"),
            files=OutputConfig(score_threshold=0.0),
            runs=str(self.folder / "runs"),
        )
        return replace(config, **changes)  # type: ignore[arg-type]


SPEC = DetectorSpec(
    classes=CLASSES,
    backbone=swin_toy(),
    # a high prior, so that random weights detect something everywhere
    localizer=ActionFormerConfig(width=16, heads=2, levels=3, window=5, head_width=16, prior=0.3),
    size=32,
    window=WindowConfig(frames=64, fps=12.0),
)


@pytest.fixture(scope="module")
def setting(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("detect")
    torch.manual_seed(1)  # with it the random detector finds something
    save_detector(folder / "checkpoint" / "detector", SPEC, SPEC.build())
    run = start_run(DetectConfig(), output=folder / "runs")
    (folder / "videos").mkdir()
    for name in ("toy_000.mp4", "toy_001.mp4"):
        shutil.copy(tiny_set / "videos" / name, folder / "videos")
    (folder / "videos" / "broken.mp4").write_text("this is no video")
    return Setting(folder=folder, run=run)


def run_script(setting: Setting, model: str) -> str:
    dropped = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    command = [sys.executable, str(SCRIPT), "--videos", "videos", "--model", model]
    done = subprocess.run(
        [*command, "--output", "found", "--score-threshold", "0", "--batch-size", "2"],
        cwd=setting.folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Ray's remark on the arguments of Ray Data's actors, which are restarted, cannot be turned off
    lines = [line for line in done.stderr.splitlines() if "has constructor arguments" not in line]
    assert lines == []
    return done.stdout


def check_files(setting: Setting) -> None:
    """All formats hold what `re2tal.detect` finds."""
    found = setting.folder / "found"
    detections = read_detections(found / "detections.json", CLASSES)
    assert list(detections) == ["toy_000", "toy_001"]
    page = Page(found / "index.html")
    shown = {video["id"]: video for video in page.data["videos"]}
    assert shown["broken"]["failed"]
    rows = read_csv(found / "detections.csv")
    for video_id, mine in detections.items():
        path = setting.folder / "videos" / f"{video_id}.mp4"
        expected = re2tal.detect(path, setting.detector, device="cpu").detections[:200]
        assert len(expected) > 0
        assert (found / shown[video_id]["source"]).resolve() == path.resolve()
        assert len(shown[video_id]["found"]) == len(expected)
        torch.testing.assert_close(mine.segments.float(), expected.segments, atol=1e-3, rtol=0)
        torch.testing.assert_close(mine.scores.float(), expected.scores)
        assert mine.labels.equal(expected.labels)
        mine_rows = [row for row in rows if row["video"] == video_id]
        assert [row["label"] for row in mine_rows] == [CLASSES[i] for i in expected.labels]
        cues = (found / "subtitles" / f"{video_id}.vtt").read_text().count(" --> ")
        assert cues == len(expected)
        assert (found / "subtitles" / f"{video_id}.srt").read_text().startswith("1\n00:00:")
        assert (found / "timelines" / f"{video_id}.png").read_bytes().startswith(b"\x89PNG")
    (reason,) = json.loads((found / "failures.json").read_text()).values()
    assert "cannot be opened as a video" in reason


def check_tracking(setting: Setting) -> None:
    client: MlflowClient = setting.run.client
    (experiment,) = client.search_experiments(filter_string="name = 're2tal'")
    (run,) = client.search_runs([experiment.experiment_id], filter_string="params.output = 'found'")
    assert run.info.status == "FINISHED"
    assert run.data.params["files.score_threshold"] == "0.0"
    metrics = run.data.metrics
    assert (metrics["videos/detected"], metrics["videos/failed"]) == (2, 1)
    assert metrics["windows"] >= 4
    assert metrics["frames_per_second"] > 0
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    tables = {"detections.json", "detections.csv", "failures.json", "index.html"}
    assert files == tables | {"timelines"}


@pytest.mark.slow
def test_mlflow_serves_a_model_for_paths_uris_and_contents(setting: Setting) -> None:
    path = setting.folder / "videos" / "toy_000.mp4"
    content = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    with served(setting, log_model(setting.run, setting.detector)) as address:
        answer = requests.post(address, json={"inputs": [str(path), path.as_uri(), content]})
        assert answer.status_code == 200, answer.text
        by_video: dict[str, list[Any]] = {}
        for row in answer.json()["predictions"]:
            by_video.setdefault(row.pop("video"), []).append(row)
        names = [str(path), path.as_uri(), f"{content[:40]}..."]
        assert list(by_video) == names
        expected = re2tal.detect(path, setting.detector, device="cpu").to_list()
        for name in names:
            assert len(by_video[name]) == len(expected) > 0
            best, (start, end) = by_video[name][0], expected[0]["segment"]
            assert best["label"] == expected[0]["label"]
            assert (best["start"], best["end"]) == pytest.approx((start, end), abs=1e-3)
        for wrong, reason in (
            ("/nothing.mp4", "no such file"),
            ("data:video/mp4,AAAA", "must begin with data:video/mp4;base64"),
            ("data:video/mp4;base64,A", "is not base64"),
        ):
            answer = requests.post(address, json={"inputs": [wrong]})
            assert (answer.status_code, reason in answer.text) == (400, True), answer.text


@contextmanager
def served(setting: Setting, model: str) -> Iterator[str]:
    """Address of a model's server, which is started as `make serve` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = str(Path(sys.executable).parent)  # MLflow looks for uvicorn on the path
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model]
    server = subprocess.Popen(
        [*command, "--env-manager", "local", "--port", str(port)],
        env={
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "MLFLOW_TRACKING_URI": setting.run.uri,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 300
        while not _answers(f"http://127.0.0.1:{port}/ping"):
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _answers(address: str) -> bool:
    try:
        return requests.get(address, timeout=5).ok
    except requests.ConnectionError:
        return False


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_it_detects_with_a_model_of_mlflow_and_the_second_time_only_what_failed(
    setting: Setting,
) -> None:
    uri = log_model(setting.run, setting.detector)
    setting.run.client.set_tag(setting.run.run_id, "model.uri", uri)
    printed = run_script(setting, model=setting.run.run_id)
    assert "failed: broken" in printed
    assert "0 of 3 videos are done; 3 to do" in printed
    check_files(setting)
    check_tracking(setting)
    records = setting.folder / "found" / "videos"
    before = {path.name: path.stat().st_mtime_ns for path in records.iterdir()}
    shutil.copy(setting.folder / "videos" / "toy_000.mp4", setting.folder / "videos" / "broken.mp4")
    script.run(setting.config(files=OutputConfig(score_threshold=0.0, top_k=3, formats=("csv",))))
    after = {path.name: path.stat().st_mtime_ns for path in records.iterdir()}
    assert after.keys() - before.keys() == {"broken.json"}
    assert before.items() <= after.items()
    rows = read_csv(setting.folder / "found" / "detections.csv")
    assert [row["video"] for row in rows] == ["broken"] * 3 + ["toy_000"] * 3 + ["toy_001"] * 3
    # the same video; windows went through the detector two at a time then, and one now
    scores = [float(row["score"]) for row in rows]
    assert scores[:3] == pytest.approx(scores[3:6], abs=1e-5)
    assert json.loads((setting.folder / "found" / "failures.json").read_text()) == {}
    save_detector(setting.folder / "other", SPEC, SPEC.build())
    with pytest.raises(UserError, match="another model"):
        script.run(setting.config(model=str(setting.folder / "other")))


@pytest.mark.slow
def test_a_model_is_found_where_training_leaves_it(setting: Setting) -> None:
    def find(model: str | None) -> Path:
        scratch = setting.folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        return local_detector(model, scratch, tracking=setting.run.uri, option="--model")

    assert find(str(setting.folder / "checkpoint")) == setting.detector
    assert find(str(setting.detector)) == setting.detector
    copied = find((setting.folder / "checkpoint").as_uri())
    assert copied.parent.name == "scratch"
    assert fingerprint(copied) == fingerprint(setting.detector)
    without = start_run(DetectConfig(), output=setting.folder / "runs").run_id
    for model, message in (
        (None, "no path given. Say where with --model"),
        ("nowhere", "nothing at nowhere"),
        (str(setting.folder / "videos"), "holds no detector"),
        (without, "has none; a training run logs its model when it ends"),
        ("0" * 32, "neither a file nor a run"),
        ("models:/nothing/1", "cannot be downloaded from"),
    ):
        with pytest.raises(UserError, match=message):
            find(model)


def test_the_command_line_is_read() -> None:
    config = parse(["--videos", "a.mp4", "b", "--model", "m", "--formats", "vtt", "--gpu", "False"])
    assert (config.videos, config.model) == (("a.mp4", "b"), "m")
    assert (config.files.formats, config.resources.pool.gpu) == (("vtt",), False)
