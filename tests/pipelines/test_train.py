"""Main script as a user runs it: on files, through Ray, into MLflow, and as a Ray job."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pyarrow as pa
import pytest
import torch
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobSubmissionClient
from torch import Tensor

import pipelines.training.run as training
from pipelines.config.recipe import FinetuneConfig, Recipe
from pipelines.core.metric_names import BEST_MAP, MAP, UNSCORED
from pipelines.data.plan import Plan
from pipelines.data.videos import probe_files_here
from pipelines.train import parse
from pipelines.training.checkpoints import complete, read_listing
from pipelines.training.detection import DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.retention import checkpoint_name, checkpoints
from pipelines.training.trainer import Trainer
from re2tal.errors import UserError
from tests.pipelines.ray_head import ROOT, Head, environment, processes, ray_head, run_command
from tests.pipelines.scripts import run_here

SCRIPT = ROOT / "pipelines" / "train.py"
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
    "--checkpoints.steps", "2",
)  # fmt: skip


def _data(tiny_set: Path) -> tuple[str, ...]:
    return (
        "--data.annotations", str(tiny_set / "annotations.json"),
        "--data.videos", str(tiny_set / "videos"),
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.usefixtures("ray_instance")
def test_finetuning_first_is_one_run_with_two_children_and_goes_on_where_it_was(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*_data(tiny_set), *TINY, "--finetune-epochs", "1", "--finetune.frames", "16")
    real = training.train_run

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_run", stopped)  # after the first step
    with pytest.raises(KeyboardInterrupt):
        run_here(SCRIPT, *command, folder=tmp_path)
    monkeypatch.setattr(training, "train_run", real)
    printed = run_here(SCRIPT, *command, folder=tmp_path)
    assert "going on with the unfinished run" in printed
    assert "1 of 2: finetuning" not in printed
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 're2tal'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    of_it = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(of_it) == len(runs) - 1
    ended = {r.info.run_name.split("-")[0]: r for r in of_it if r.info.status == "FINISHED"}
    assert ended.keys() == {"toy", "toy_finetuning"}
    assert parent.info.status == "FINISHED"
    weights = tmp_path / "runs" / ended["toy_finetuning"].info.run_id / "backbone.safetensors"
    assert ended["toy"].data.params["model.weights"] == str(weights)
    assert ended["toy_finetuning"].data.metrics.keys() >= {"val/top1", "train/loss"}
    for tag in (BEST_MAP, "model.uri"):
        assert parent.data.tags[tag] == ended["toy"].data.tags[tag]
    assert parent.data.metrics[MAP] == float(parent.data.tags[BEST_MAP])


def test_finetuning_needs_frames_and_is_refused_where_nothing_would_do_it(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(tiny_recipe, output=str(tmp_path), finetune=FinetuneConfig(epochs=1))
    with pytest.raises(UserError, match=r"--finetune-epochs belongs to train.py"):
        training.prepare(recipe)
    with pytest.raises(UserError, match=r"--data.features replace it"):
        training.train(replace(recipe, data=replace(recipe.data, features=str(tmp_path))))
    moving = replace(recipe, epochs=4, model=replace(recipe.model, coupling_epochs=3.0))
    with pytest.raises(UserError, match=r"--model.coupling-epochs must be .* at most the 1"):
        training.train(moving)


def test_videos_that_the_second_step_would_refuse_stop_the_first(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations = json.loads(Path(str(tiny_recipe.data.annotations)).read_text())
    for lost in ("a", "b"):  # without segments, so that finetuning does not miss them
        annotations["database"][lost] = {"subset": "training", "duration": 5.0, "annotations": []}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(annotations))

    def here(files: Mapping[str, str], **_: object) -> pa.Table:
        return probe_files_here(files)

    monkeypatch.setattr(training, "probe_files", here)
    monkeypatch.setattr(training, "_start_ray", lambda _: None)
    recipe = replace(
        tiny_recipe,
        output=str(tmp_path / "runs"),
        finetune=FinetuneConfig(epochs=1, frames=16),
        data=replace(tiny_recipe.data, annotations=str(path)),
    )
    with pytest.raises(UserError, match=r"videos cannot be used, more than the allowed 5%"):
        training.train(recipe)
    assert not (tmp_path / "runs").exists()  # no run was begun


class _Disturbed(io.StringIO):
    """Output of a training in this process that is interrupted.

    The worker is killed at its second checkpoint, and the command is stopped at the fourth, as by
    Ctrl-C.
    """

    checkpoints = 0

    def write(self, text: str) -> int:
        if "checkpoint after step" in text:
            self.checkpoints += 1
            if self.checkpoints == 2:
                processes(os.getpid(), "ray::RayTrainWorker")[-1].kill()
            if self.checkpoints == 4:
                os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


@pytest.fixture(scope="module")
def finished(
    tiny_set: Path, tmp_path_factory: pytest.TempPathFactory, ray_instance: None
) -> tuple[Path, str]:
    """Folder in which the script lost a worker, was stopped, and killed at its end; and its output.

    The third command ends the run.
    """
    folder, printed = tmp_path_factory.mktemp("run"), _Disturbed()
    command = ("toy", *_data(tiny_set), *TINY, "--fit", "2GiB")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stopped:
            run_here(SCRIPT, *command, folder=folder, printed=printed)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stopped.value.code == 128 + signal.SIGINT
    run = _run(folder)
    assert run.info.status == "KILLED"
    assert "error" not in run.data.tags
    run_here(SCRIPT, *command, folder=folder, printed=printed)
    _leave_as_killed(folder)
    run_here(SCRIPT, *command, folder=folder, printed=printed)
    return folder, printed.getvalue()


def _leave_as_killed(folder: Path) -> None:
    """Leave a run as SIGKILL would while Ray Train writes its list and MLflow logs the model.

    The last checkpoint is then complete, and a surplus one is still there.
    """
    client, run = _client(folder), _run(folder)
    client.update_run(run.info.run_id, status="RUNNING")
    client.set_tag(run.info.run_id, "re2tal.driver", f"{socket.gethostname()} 99999999 1.00")
    client.create_logged_model(
        run.info.experiment_id, name="detector", source_run_id=run.info.run_id
    )
    place = folder / "runs" / run.info.run_id
    (place / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_res')
    *_, newest = sorted(place.glob("checkpoint_epoch_*"))
    half = place / checkpoint_name(epoch=1, step=1)
    shutil.copytree(newest, half)
    (half / "training.pt").write_bytes(b"half")
    surplus = place / checkpoint_name(epoch=0, step=1)
    shutil.copytree(newest, surplus)
    (surplus / "complete.json").unlink()
    complete(surplus, {MAP: UNSCORED, "epoch": 0, "step": 1})


@pytest.fixture(scope="module")
def job(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a Ray job that was stopped and submitted again, and its final output."""
    command = (sys.executable, "pipelines/train.py", "toy", *_data(tiny_set), *TINY)
    patient = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}  # by default a job on a busy machine is killed
    with ray_head(tmp_path_factory.mktemp("job"), more=patient) as head:
        command += ("--output", str(head.folder / "runs"))
        _stop(head, head.submit(*command, wait=False))
        assert _run(head.folder).info.status == "KILLED"
        assert "error" not in _run(head.folder).data.tags
        printed = head.submit(*command)
    return head.folder, printed


def _stop(head: Head, job: str) -> None:
    """Stop a job after its second checkpoint, when Ray Train is sure to have the first."""
    checkpoints = 0
    with head.log_of(job) as lines:
        for line in lines:
            checkpoints += "checkpoint after step" in line
            if checkpoints == 2:
                head.stop(job)
                break
        else:
            raise AssertionError("the job ended by itself")
        rest = "".join(lines)
    assert "succeeded" not in rest
    assert re.search(
        r"stopping \(SIGTERM\); once more ends this at once\n(?:.*\n)*?kept: .*checkpoint_epoch_0",
        rest,
    )


def _run(folder: Path) -> MlflowRun:
    """Return the only run in a folder's store."""
    client = _client(folder)
    (experiment,) = client.search_experiments(filter_string="name = 're2tal'")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def _client(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")


@pytest.mark.slow
def test_it_shows_progress_and_ends_with_the_table(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    for needed in ("epoch 2/2", "frames/s", "left", "validation", "mAP of epoch "):
        assert needed in printed
    for needed in ("tIoU 0.30", "tIoU 0.70", "average", "waiting for data", "host memory"):
        assert needed in printed
    assert f"sqlite:///{folder / 'runs' / 'mlflow.db'}" in printed
    assert "mlflow ui" in printed


@pytest.mark.slow
def test_the_run_in_mlflow_is_complete(finished: tuple[Path, str], tiny_set: Path) -> None:
    folder, _ = finished
    client = _client(folder)
    run = _run(folder)
    assert run.info.status == "FINISHED"
    assert "error" not in run.data.tags
    assert run.data.params["epochs"] == "2"
    assert run.data.params["model.localizer.width"] == "16"
    assert run.data.params["data.annotations"] == str(tiny_set / "annotations.json")
    assert len(run.data.tags["data.fingerprint"]) == 64
    metrics = run.data.metrics
    for name in (
        "train/loss", "train/loss/classification", "train/loss/regression", "train/gradient_norm",
        "lr/backbone_decayed", "train/frames_per_second", "train/data_wait_share",
        "memory/rss_mb", "memory/predicted_activations_mb", "memory/measured_activations_mb",
        "val/mAP", "val/mAP/tiou_0.30", "val/mAP/tiou_0.70",
    ):  # fmt: skip
        assert name in metrics, name
    predicted, measured = (metrics[f"memory/{k}_activations_mb"] for k in ("predicted", "measured"))
    assert predicted == pytest.approx(measured, rel=0.05)
    assert any(name.startswith("system/") for name in metrics)
    assert any(name.startswith("val/AP/") for name in metrics)
    epochs = client.get_metric_history(run.info.run_id, "val/mAP")
    steps = client.get_metric_history(run.info.run_id, "train/loss")
    assert len({m.step for m in epochs}) == 2
    # steps behind the last checkpoint were taken again, and not logged again
    assert [m.step for m in steps] == list(range(1, len(steps) + 1))
    for name in metrics:
        points = client.get_metric_history(run.info.run_id, name)
        if not name.startswith("system/"):
            assert len({m.step for m in points}) == len(points), name
    of_run = f"source_run_id = '{run.info.run_id}'"
    best_first = [{"field_name": "metrics.val/mAP", "ascending": False}]
    models = client.search_logged_models(
        [run.info.experiment_id], filter_string=of_run, order_by=best_first
    )
    assert len(models) == 2, "one for each kept checkpoint"
    best = {m.key: m for m in models[0].metrics or ()}["val/mAP"]
    assert best.value == max(m.value for m in epochs) == float(run.data.tags["best.mAP"])
    assert best.step in {m.step for m in epochs}
    assert best.dataset_name == f"{tiny_set.name} validation"
    assert run.data.tags["model.uri"] in {m.model_uri for m in models}
    name, _, time = run.info.run_name.partition("-")
    names = {f"{name}-epoch-{epoch}-{time}" for epoch in (1, 2)}
    assert {m.name for m in models} == names
    assert not any(m.key.startswith("memory/") for model in models for m in model.metrics or ())
    assert run.inputs is not None
    given = {item.dataset.name: item.tags[0].value for item in run.inputs.dataset_inputs}
    assert given == {f"{tiny_set.name} {use}": use for use in ("training", "validation")}
    assert run.data.tags["mlflow.source.name"].endswith("train.py")
    assert "train.py toy" in run.data.tags["mlflow.note.content"]
    assert run.data.tags["mlflow.user"]


def _listed(client: JobSubmissionClient, run_id: str) -> list[dict[str, Any]]:
    """List runs of Ray Train under the name of a run in MLflow, the newest first."""
    listed = client._do_request("GET", "/api/train/v2/runs/v1").json()["train_runs"]
    return [run for run in listed if run["name"] == run_id]


@pytest.mark.slow
def test_rays_dashboard_lists_the_run_its_workers_and_what_they_read(
    finished: tuple[Path, str],
) -> None:
    folder, _ = finished
    client = JobSubmissionClient(os.environ["RAY_API_SERVER_ADDRESS"])  # which has the token
    runs = _listed(client, _run(folder).info.run_id)
    end = time.monotonic() + 120
    while runs[-1]["status"] in ("SCHEDULING", "RUNNING") and time.monotonic() < end:
        time.sleep(1)  # Ray looks twice a minute for runs that were stopped
        runs = _listed(client, _run(folder).info.run_id)
    # the command was stopped, lost its end and ended: three times Ray Train began
    assert [run["status"] for run in runs] == ["FINISHED", "FINISHED", "ABORTED"], runs
    # of the one that was stopped a worker had been killed; the next may not have been noted yet
    assert [len(runs[n]["attempts"]) for n in (0, -1)] == [1, 2]
    assert [len(runs[n]["attempts"][0]["workers"]) for n in (0, -1)] == [1, 1]
    found = client._do_request("GET", f"/api/data/datasets/{runs[0]['job_id']}").json()
    names = {one["dataset"].rsplit("_", 2)[0] for one in found["datasets"]}
    assert names >= {
        "opening videos",
        "epoch 1, worker 0",
        "epoch 2, worker 0",
        "epoch 2, validation, worker 0",
        "epoch 2, validation on training videos, worker 0",
    }


@pytest.mark.slow
def test_the_layout_that_was_chosen_first_stays_the_runs(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    run = _run(folder)
    assert "considering 1 of at most 5: 1x3x64x32x32" in printed
    assert "--optim.accumulation 1 --model.stored" in printed
    assert printed.count("--fit 2GiB: the unfinished run of this command keeps its layout") == 2
    assert run.data.tags["fit"] == "2GiB"
    assert run.data.params["model.stored"] == "True"
    assert "fit.txt" in {f.path for f in _client(folder).list_artifacts(run.info.run_id)}


@pytest.mark.slow
def test_nothing_is_left_over_of_a_run_that_lost_processes(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert "going on after epoch 2 of 2" in printed
    place = folder / "runs" / _run(folder).info.run_id
    kept, rest = checkpoints(str(place))
    assert rest == {}
    assert [one.metrics["epoch"] for one in kept] == [1, 2]
    for one in kept:
        read_listing(one.uri, digests=True)


@pytest.mark.slow
def test_the_artifacts_in_mlflow_are_complete(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    client, run = _client(folder), _run(folder)
    metrics = run.data.metrics
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
    assert not any(name.startswith("diagnosis/") for name in metrics), "charts of one point"
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
    run = _run(folder)
    video = next((tiny_set / "videos").glob("*.mp4"))
    code = (
        "import mlflow, sys\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "found = model.predict([sys.argv[2]])\n"
        "assert list(found.columns) == ['video', 'start', 'end', 'label', 'score'], found\n"
        "assert (found.start < found.end).all() and found.score.between(0, 1).all()\n"
        "print('rows', len(found))\n"
    )
    env = environment(folder) | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/runs/mlflow.db"}
    printed = run_command(
        sys.executable, "-c", code, run.data.tags["model.uri"], str(video), cwd=folder, env=env
    )
    assert re.search(r"rows \d+", printed)


def _final_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the only run's last checkpoint: the detector's and its average's."""
    *_, last = sorted((folder / "runs").glob("*/checkpoint_epoch_*"))
    state = torch.load(last / "training.pt", weights_only=True)
    assert (state["epoch"], state["windows"]) == (2, 0)
    return _named(state["detector"], state["average"])


def _named(detector: dict[str, Tensor], average: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {"detector": detector, "average": average}
    return {f"{part}.{name}": v for part, state in parts.items() for name, v in state.items()}


@pytest.mark.slow
def test_a_killed_worker_changes_no_bit(
    finished: tuple[Path, str], tiny_set: Path, tiny_plan: Plan, tmp_path: Path
) -> None:
    folder, printed = finished
    # how far the run had come when it lost the worker is a matter of timing
    assert re.search(r"going on after epoch \d of 2", printed)
    _assert_same(_final_weights(folder), _undisturbed(tiny_set, tiny_plan, tmp_path))


@pytest.mark.slow
@pytest.mark.long
def test_a_stopped_job_that_is_submitted_again_changes_no_bit(
    job: tuple[Path, str], tiny_set: Path, tiny_plan: Plan, tmp_path: Path
) -> None:
    folder, printed = job
    assert "going on with the unfinished run" in printed
    assert re.search(r"going on after epoch \d of 2", printed)
    assert _run(folder).info.status == "FINISHED"
    for needed in ("epoch 2/2", "tIoU 0.30", "succeeded"):
        assert needed in printed
    # Ray's advice about small machines is its daemon's own and cannot be turned off
    advice = ("PYTHON worker processes have been started", "job_manager", "cli.py")
    noise = [
        line
        for line in printed.splitlines()
        if ("WARNING" in line or "INFO" in line or "pid=" in line)
        and not any(known in line for known in advice)
    ]
    assert noise == []
    _assert_same(_final_weights(folder), _undisturbed(tiny_set, tiny_plan, tmp_path))


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def _undisturbed(tiny_set: Path, plan: Plan, folder: Path) -> dict[str, Tensor]:
    """Weights with which the same recipe ends in this process, without Ray."""
    recipe = parse(["toy", *_data(tiny_set), *TINY])
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as the only worker of a node has
    try:
        trainer = Trainer(
            DetectionTask(recipe=recipe, plan=plan),
            LocalRuntime(recipe, plan, folder),
            weights=None,
            output=str(folder),
        )
        trainer.run()
    finally:
        torch.set_num_threads(threads)
    state = trainer.state
    return _named(state.detector.state_dict(), state.average.state_dict())


def test_what_a_job_uploads_is_small(tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    # as `ray job submit` does it
    excludes = get_runtime_env_default_excludes()
    create_package(str(ROOT), package, include_gitignore=True, excludes=excludes)
    assert package.stat().st_size < 10 * 2**20
    folders = {name.partition("/")[0] for name in ZipFile(package).namelist()}
    assert {"re2tal", "pipelines", "sweeps", "cluster"} <= folders
    assert folders.isdisjoint({"tests", "data", "runs", ".git", ".venv", ".github"})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("no_such_recipe",), "There is no recipe 'no_such_recipe'"),
        (("thumos_re2_swin_t_actionformer",), "no path given. Say where with --data.annotations"),
        (("toy", "--data.annotations", "/nowhere.json", "--data.no-make-toy"), "/nowhere.json"),
        (("toy", "--model.weights", "/nowhere.pth"), "nothing at /nowhere.pth"),
        (("toy", "--epochs", "many"), "epochs"),
        (("toy", "--fit", "24"), "'24' is not a memory size"),
        (("toy", "--fit", "auto"), "this recipe trains without one (--scale.no-gpu)"),
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
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code not in (None, 0)
    assert expected in f"{ended.value.code}{capsys.readouterr().err}"
