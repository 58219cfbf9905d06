"""The main script as a user runs it: on files, through Ray, into MLflow, and as a Ray job."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor

from pipelines.quiet import free_port

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
TINY = (
    "--model.weights", "None",
    "--data.size", "32",
    "--data.window.frames", "64",
    "--model.localizer.width", "16",
    "--model.localizer.heads", "2",
    "--model.localizer.levels", "3",
    "--model.localizer.head-width", "16",
    "--epochs", "2",
    "--batch-size", "1",
    "--scale.workers", "1",
)  # fmt: skip


def _environment(home: Path) -> dict[str, str]:
    """Without what would point the script at another store or cluster; with a home of its own."""
    dropped = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"HOME": str(home), "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}


def _run(*command: str, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=420)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _data(tiny_set: Path) -> tuple[str, ...]:
    return (
        "--data.annotations", str(tiny_set / "annotations.json"),
        "--data.videos", str(tiny_set / "videos"),
    )  # fmt: skip


def _submit(*command: str, cwd: Path, env: dict[str, str]) -> str:
    """Submits a job and waits for it; a head that has just started may not have its agent yet."""
    for _ in range(20):
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=420
        )
        if "No available agent" not in done.stderr:
            break
        time.sleep(3)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def _ray_head(folder: Path, env: dict[str, str]) -> Iterator[str]:
    """Starts a Ray head with token authentication, and gives the address that jobs go to."""
    _run(RAY, "get-auth-token", "--generate", cwd=folder, env=env)
    dashboard = free_port()
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}",
         f"--dashboard-port={dashboard}",
         f"--dashboard-agent-listen-port={free_port()}",  # another Ray may run in this suite
         "--disable-usage-stats", "--include-dashboard=true"],
        cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert head.stdout is not None
        for line in head.stdout:
            if "Ray runtime started" in line:
                break
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        head.terminate()  # ends the daemons too, which are in sessions of their own
        head.wait(timeout=60)


@pytest.fixture(scope="module")
def finished(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder in which the script ran as a Ray job, and what the job printed."""
    folder = tmp_path_factory.mktemp("run")
    env = _environment(folder) | {"RAY_AUTH_MODE": "token"}
    with _ray_head(folder, env) as address:
        printed = _submit(
            RAY, "job", "submit", "--address", address,
            "--working-dir", str(ROOT), "--runtime-env-json", json.dumps({"excludes": ["tests"]}),
            "--", sys.executable, "pipelines/train.py", "toy", *_data(tiny_set), *TINY,
            "--output", str(folder / "runs"),
            cwd=folder, env=env,
        )  # fmt: skip
    return folder, printed


def _client(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")


@pytest.mark.slow
def test_a_job_shows_progress_and_ends_with_the_table(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    for needed in ("epoch 1/2", "epoch 2/2", "frames/s", "left", "validation", "mAP"):
        assert needed in printed
    for needed in ("tIoU 0.30", "tIoU 0.70", "average", "waiting for data", "host memory"):
        assert needed in printed
    assert f"sqlite:///{folder / 'runs' / 'mlflow.db'}" in printed
    assert "mlflow ui" in printed
    assert "succeeded" in printed


@pytest.mark.slow
def test_the_run_in_mlflow_is_complete(finished: tuple[Path, str], tiny_set: Path) -> None:
    folder, _ = finished
    client = _client(folder)
    (experiment,) = client.search_experiments(filter_string="name = 're2tal'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["epochs"] == "2"
    assert run.data.params["model.localizer.width"] == "16"
    assert run.data.params["data.annotations"] == str(tiny_set / "annotations.json")
    assert len(run.data.tags["data.fingerprint"]) == 64
    metrics = run.data.metrics
    for name in (
        "train/loss", "train/loss/classification", "train/loss/regression", "train/gradient_norm",
        "lr/backbone_decayed", "train/frames_per_second", "train/data_wait_share",
        "memory/rss_mb", "memory/predicted_activations_mb", "memory/measured_activations_mb",
        "val/mAP", "val/mAP/tiou_0.30", "val/mAP/tiou_0.70", "best/mAP",
    ):  # fmt: skip
        assert name in metrics, name
    predicted, measured = (metrics[f"memory/{k}_activations_mb"] for k in ("predicted", "measured"))
    assert predicted == pytest.approx(measured, rel=0.05)
    assert any(name.startswith("system/") for name in metrics)
    assert any(name.startswith("val/AP/") for name in metrics)
    epochs = client.get_metric_history(run.info.run_id, "val/mAP")
    steps = client.get_metric_history(run.info.run_id, "train/loss")
    assert len(epochs) == 2
    assert [m.step for m in steps] == list(range(1, len(steps) + 1))
    pictures = {f.path for f in client.list_artifacts(run.info.run_id, "pictures")}
    assert pictures == {
        f"pictures/{name}.png"
        for name in (
            "curves",
            "timelines",
            "diagnosis_false_positives",
            "diagnosis_sensitivity",
            "diagnosis_false_negatives",
        )
    }
    assert "diagnosis/missed" in metrics
    tables = {f.path for f in client.list_artifacts(run.info.run_id, "diagnosis")}
    assert tables == {
        f"diagnosis/{name}.json"
        for name in (
            "false_positives",
            "effects",
            "sensitivity",
            "false_negatives",
            "false_negative_pairs",
        )
    }
    assert {f.path for f in client.list_artifacts(run.info.run_id, "data")} == {"data/summary.txt"}
    files = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"detections.json", "unusable_videos.json"} <= files


@pytest.mark.slow
def test_the_model_detects_in_a_clean_process(finished: tuple[Path, str], tiny_set: Path) -> None:
    folder, _ = finished
    client = _client(folder)
    (experiment,) = client.search_experiments(filter_string="name = 're2tal'")
    (run,) = client.search_runs([experiment.experiment_id])
    video = next((tiny_set / "videos").glob("*.mp4"))
    code = (
        "import mlflow, sys\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "found = model.predict([sys.argv[2]])\n"
        "assert list(found.columns) == ['video', 'start', 'end', 'label', 'score'], found\n"
        "assert (found.start < found.end).all() and found.score.between(0, 1).all()\n"
        "print('rows', len(found))\n"
    )
    env = _environment(folder) | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/runs/mlflow.db"}
    printed = _run(
        sys.executable, "-c", code, run.data.tags["model.uri"], str(video), cwd=folder, env=env
    )
    assert re.search(r"rows \d+", printed)


def _processes(process: subprocess.Popen[str], name: str = "") -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if child.name().startswith(name)]


def _final_weights(folder: Path) -> dict[str, Tensor]:
    """Of the last checkpoint of the only run: the trained detector's and its average's."""
    *_, last = sorted((folder / "runs").glob("*/checkpoint_2*"))
    state = torch.load(last / "training.pt", weights_only=True)
    assert (state["epoch"], state["windows"]) == (2, 0)
    return {
        f"{part}.{name}": value
        for part in ("detector", "average")
        for name, value in state[part].items()
    }


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_driver_change_no_bit(
    finished: tuple[Path, str], tiny_set: Path, tmp_path: Path
) -> None:
    command = (
        sys.executable, str(ROOT / "pipelines" / "train.py"), "toy", *_data(tiny_set), *TINY,
        "--checkpoints.steps", "2",
    )  # fmt: skip
    killed = "nothing"
    with subprocess.Popen(
        command, cwd=tmp_path, env=_environment(tmp_path), stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            if killed == "nothing" and "step   1/" in line:  # before the first checkpoint
                _processes(driver, "ray::RayTrainWorker")[-1].kill()
                killed = "worker"
            elif killed == "worker" and "epoch 2/2" in line:  # after a checkpoint
                left = _processes(driver)
                driver.kill()
                killed = "driver"
    assert killed == "driver"
    psutil.wait_procs(left, timeout=60)
    printed = _run(*command, cwd=tmp_path, env=_environment(tmp_path))
    assert "going on with the unfinished run" in printed
    # Ray's advice about small machines is its daemon's own and cannot be turned off
    advice = "PYTHON worker processes have been started"
    lines = [line for line in printed.splitlines() if advice not in line]
    assert [line for line in lines if "WARNING" in line or "INFO" in line or "pid=" in line] == []
    # how far the run had come when it was killed is a matter of timing
    assert re.search(r"going on after epoch \d of 2", printed)
    expected, found = _final_weights(finished[0]), _final_weights(tmp_path)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    client = _client(tmp_path)
    (experiment,) = client.search_experiments(filter_string="name = 're2tal'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    steps = client.get_metric_history(run.info.run_id, "train/loss")
    assert {m.step for m in steps} == set(range(1, max(m.step for m in steps) + 1))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("no_such_recipe",), "There is no recipe 'no_such_recipe'"),
        (("thumos_re2_swin_t_actionformer",), "no path given. Say where with --data.annotations"),
        (("toy", "--data.annotations", "/nowhere.json", "--data.no-make-toy"), "/nowhere.json"),
        (("toy", "--model.weights", "/nowhere.pth"), "nothing at /nowhere.pth"),
        (("toy", "--epochs", "many"), "epochs"),
    ],
)
def test_what_cannot_start_ends_in_one_clear_error(
    tiny_set: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = (
        _data(tiny_set) if arguments[0] == "toy" and "--data.annotations" not in arguments else ()
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *data])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "pipelines" / "train.py"), run_name="__main__")
    assert ended.value.code not in (None, 0)
    assert expected in f"{ended.value.code}{capsys.readouterr().err}"
