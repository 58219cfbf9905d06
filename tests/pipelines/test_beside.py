"""Evaluation beside the training: the same numbers, whatever is killed, and none is lost."""

import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest
import ray
import torch
from mlflow.tracking import MlflowClient
from ray.train import UserCallback

from pipelines.config.recipe import CheckpointConfig, Recipe, ScaleConfig
from pipelines.core.metric_names import BEST_MAP, MAP, UNSCORED, VALIDATION_LOSS
from pipelines.core.progress import ProgressPrinter
from pipelines.core.storage import replacing, resolve
from pipelines.core.tracking import Run, start_run
from pipelines.data.batches import Video
from pipelines.data.feature_stream import without_backbone
from pipelines.data.features import NAME, Features
from pipelines.data.plan import Plan, make_plan
from pipelines.train import parse
from pipelines.training import beside
from pipelines.training.beside import Evaluations, evaluate_waiting
from pipelines.training.checkpoints import COMPLETE_FILE, complete, read_listing
from pipelines.training.detection import DETECTIONS_FILE, DetectionTask
from pipelines.training.local import LocalRuntime
from pipelines.training.retention import checkpoints, remove_surplus
from pipelines.training.run import fit
from pipelines.training.trainer import Evaluation, Trainer
from pipelines.training.worker import Job, TrainingProblem, metrics_sent
from re2tal.datasets import load_annotations
from re2tal.errors import UserError
from tests.pipelines.ray_head import ROOT, processes
from tests.pipelines.scripts import run_here

EPOCHS = 3


@pytest.fixture
def features(tiny_plan: Plan, tmp_path: Path) -> Path:
    """Folder of random features of the tiny set."""
    folder = tmp_path / "features"
    folder.mkdir()
    random = np.random.default_rng(0)
    for video in (*tiny_plan.training, *tiny_plan.validation):
        known = video.annotation
        array = random.normal(size=(int(6 * known.duration), 8)).astype(np.float32)
        np.save(folder / f"{known.video_id}.npy", array)
    clips = {"fps": 12.0, "stride": 2, "frames": 2}
    described = {"format": "re2tal features 1", "layout": "npy", "clips": clips}
    (folder / NAME).write_text(json.dumps(described))
    return folder


@pytest.fixture
def recipe(tiny_recipe: Recipe, features: Path, tmp_path: Path) -> Recipe:
    """Recipe on features, which need no decoding, with two passes in a step."""
    data = replace(tiny_recipe.data, features=str(features), videos=None, max_failed=0.3)
    return replace(
        without_backbone(replace(tiny_recipe, data=data), Features(str(features))),
        epochs=EPOCHS,
        batch_size=1,
        output=str(tmp_path / "runs"),
        checkpoints=CheckpointConfig(keep=1),
        optim=replace(tiny_recipe.optim, accumulation=2, precision="float32"),
    )


@pytest.fixture
def task(recipe: Recipe) -> DetectionTask:
    annotations = load_annotations(Path(str(recipe.data.annotations)))
    return DetectionTask(recipe=recipe, plan=make_plan(recipe.data, annotations))


def _damage(videos: Sequence[Video]) -> None:
    """Damage videos' features after the plan has checked them."""
    for video in videos:
        Path(video.uri).write_bytes(b"damaged")


class _Beside(LocalRuntime):
    """Worker that does not evaluate; it keeps its checkpoints in a folder, as Ray's worker does."""

    evaluates = False

    def report(self, metrics: Mapping[str, float], checkpoint: Path) -> None:
        assert metrics[MAP] == UNSCORED
        folder = self._checkpoint.parent
        shutil.copytree(checkpoint, folder / checkpoint.name)
        remove_surplus(str(folder), self._recipe.checkpoints, MAP, written=checkpoint.name)


@pytest.fixture
def job(task: DetectionTask, tmp_path: Path) -> Job:
    return _job(task, tmp_path)


def _job(task: DetectionTask, folder: Path) -> Job:
    posted: list[str] = []
    board: Any = SimpleNamespace(post=SimpleNamespace(remote=posted.append), posted=posted)
    run = start_run(task.recipe, output=str(folder / "store"))
    return Job(task=task, run=run, output=str(folder / "run"), board=board)


def _trained(task: DetectionTask, runtime: LocalRuntime) -> Trainer:
    trainer = Trainer(task, runtime, weights=None, output=runtime._checkpoint.parent.as_posix())
    trainer.run()
    return trainer


def _evaluations(history: list[tuple[int, dict[str, float]]]) -> dict[int, dict[str, float]]:
    """Return the metrics of the evaluations by step."""
    return {
        step: {name: value for name, value in metrics.items() if "reversible" not in name}
        for step, metrics in history
        if MAP in metrics
    }


def _points(run: Run, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in run.client.get_metric_history(run.run_id, name))


def test_the_numbers_are_those_of_the_evaluation_by_the_worker(
    task: DetectionTask, tmp_path: Path
) -> None:
    _damage(task.plan.training[:1])
    runtime = LocalRuntime(task.recipe, task.plan, tmp_path / "alone")
    alone = _trained(task, runtime)
    expected = _evaluations(runtime.history)
    assert len(expected) == EPOCHS
    assert {metrics["videos/failed"] for metrics in expected.values()} == {1.0}
    job = _job(task, tmp_path)
    other = _Beside(task.recipe, task.plan, Path(job.output))
    trained = _trained(task, other).state
    assert not _evaluations(other.history)
    for name, value in alone.state.detector.state_dict().items():
        assert torch.equal(value, trained.detector.state_dict()[name]), name
    kept, rest = checkpoints(job.output)
    assert (len(kept), rest) == (EPOCHS, {}), "those that wait stay, however many are kept"
    for one in reversed(kept):  # in whatever order
        assert one.waits
        assert evaluate_waiting(job, one.uri) == ""
        assert evaluate_waiting(job, one.uri) == "", "an attempt that was lost at its end"
    done, _ = checkpoints(job.output)
    assert not any(one.waits for one in done)
    position = {"step"}
    found = {
        int(one.metrics["step"]): {n: v for n, v in one.metrics.items() if n not in position}
        for one in done
    }
    assert found == expected
    for name in next(iter(expected.values())):
        points = [(step, metrics[name]) for step, metrics in expected.items()]
        assert _points(job.run, name) == points, name
    for one in done:
        read_listing(one.uri, digests=True)
    written = (Path(done[-1].uri) / DETECTIONS_FILE).read_bytes()
    assert written == (tmp_path / "alone" / "checkpoint" / DETECTIONS_FILE).read_bytes()
    shown = [line.partition("(")[0] for line in runtime.lines if "validation" in line]
    assert [line.partition("(")[0] for line in job.board.posted] == shown[::-1]
    remove_surplus(job.output, task.recipe.checkpoints, MAP)
    best = max(expected.values(), key=lambda metrics: metrics[MAP])[MAP]
    kept, _ = checkpoints(job.output)
    assert best in {one.metrics[MAP] for one in kept}
    assert len(kept) < EPOCHS


class _Killed(BaseException):
    """Exception that stands for the end of the process at a certain line."""


@pytest.fixture
def waiting(task: DetectionTask, job: Job) -> str:
    """URI of the only checkpoint of a run of one epoch, which waits for its evaluation."""
    recipe = replace(task.recipe, epochs=1)
    _trained(replace(task, recipe=recipe), _Beside(recipe, task.plan, Path(job.output)))
    (one,), rest = checkpoints(job.output)
    assert (one.waits, rest) == (True, {})
    return one.uri


def test_an_evaluation_that_is_killed_anywhere_is_made_again_and_logged_once(
    job: Job, waiting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_listing(waiting)
    written: list[str] = []

    for place in ("", DETECTIONS_FILE, COMPLETE_FILE):  # the last: MLflow has the metrics

        @contextmanager
        def replaced(uri: str, place: str = place) -> Iterator[Any]:
            with replacing(uri) as stream:
                yield stream
                written.append(uri)
                if uri.endswith(place):
                    raise _Killed

        @contextmanager
        def sent(job: Job, place: str = place) -> Iterator[Any]:
            if place != COMPLETE_FILE:
                raise _Killed
            with metrics_sent(job) as logger:
                yield logger

        with monkeypatch.context() as patch:
            patch.setattr(beside, "replacing", replaced)
            patch.setattr(beside, "metrics_sent", sent)
            with pytest.raises(_Killed):
                evaluate_waiting(job, waiting)
        assert read_listing(waiting, digests=True) == before
    assert [uri.rpartition("/")[2] for uri in written] == [
        DETECTIONS_FILE,
        DETECTIONS_FILE,
        DETECTIONS_FILE,
        COMPLETE_FILE,
    ]
    assert evaluate_waiting(job, waiting) == ""
    after = read_listing(waiting, digests=True)
    assert after.waiting is None
    assert after.files.keys() == before.files.keys() | {DETECTIONS_FILE}
    step = int(after.metrics["step"])
    for name in after.metrics.keys() - {"step"}:
        assert _points(job.run, name) == [(step, after.metrics[name])], name


def test_what_would_end_the_training_ends_it_with_the_same_message(
    task: DetectionTask, job: Job, tmp_path: Path
) -> None:
    _damage([*task.plan.training[:1], *task.plan.validation[:1]])
    runtime = LocalRuntime(task.recipe, task.plan, tmp_path / "alone")
    with pytest.raises(UserError, match=r"2 of 5 videos cannot be used") as expected:
        _trained(task, runtime)
    _trained(task, _Beside(task.recipe, task.plan, Path(job.output)))  # there too few fail
    (one, *_), _ = checkpoints(job.output)
    assert evaluate_waiting(job, one.uri) == TrainingProblem(message=str(expected.value))
    assert read_listing(one.uri).waiting is not None, "it is tried again by the same command"


def test_a_checkpoint_that_is_damaged_or_replaced_is_no_reason_to_stop(
    job: Job, waiting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Path(waiting) / "training.pt"
    content = state.read_bytes()
    state.write_bytes(bytes(len(content)))
    assert "training.pt does not have the CRC-32" in str(evaluate_waiting(job, waiting))
    state.write_bytes(content)
    evaluated = beside.evaluate

    def replaced() -> None:
        complete(Path(waiting), {MAP: UNSCORED, "epoch": 1, "step": 9}, waiting=known)

    known = read_listing(waiting).waiting
    for change, reason in (
        (replaced, "was replaced while it was evaluated"),
        (lambda: shutil.rmtree(waiting), "complete.json is missing"),
    ):

        def meanwhile(*given: Any, change: Callable[[], None] = change, **more: Any) -> Evaluation:
            found = evaluated(*given, **more)
            change()
            return found

        with monkeypatch.context() as patch:
            patch.setattr(beside, "evaluate", meanwhile)
            assert reason in str(evaluate_waiting(job, waiting))
        assert _points(job.run, MAP) == []
    assert not Path(waiting).exists()


def test_a_checkpoint_in_an_object_store_is_evaluated_there(
    job: Job, waiting: str, remote: str
) -> None:
    uri = f"{remote}/{Path(waiting).name}"
    filesystem, path = resolve(uri)
    filesystem.create_dir(path, recursive=True)
    pafs.copy_files(waiting, path, destination_filesystem=filesystem)
    assert evaluate_waiting(replace(job, output=remote), uri) == ""
    assert evaluate_waiting(job, waiting) == ""
    assert read_listing(uri, digests=True) == read_listing(waiting, digests=True)
    (kept,), rest = checkpoints(remote)
    assert (kept.waits, rest) == (False, {})


def test_trials_whose_epochs_are_compared_are_refused(task: DetectionTask, job: Job) -> None:
    recipe = replace(task.recipe, scale=ScaleConfig(gpu=False, validation_workers=1))
    task = replace(task, recipe=recipe)
    with pytest.raises(UserError, match=r"--scale.validation-workers must be 0 for a trial"):
        fit(task, job.run, callbacks=[UserCallback()])


@pytest.mark.slow
def test_what_a_killed_driver_left_is_evaluated_and_a_lost_nodes_workers_come_first(
    job: Job, waiting: str, ray_instance: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(
        job.task.recipe, scale=ScaleConfig(gpu=False, cpus_per_worker=0.5, validation_workers=1)
    )
    with ProgressPrinter(interval=0.1) as progress:
        task = replace(job.task, recipe=recipe)  # type: ignore[type-var]
        job = replace(job, task=task, board=progress.board)
        with Evaluations(job, stop=lambda: pytest.fail("an evaluation failed")) as evaluations:
            _until(lambda: evaluations._running)
            with monkeypatch.context() as patch:
                patch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
                _until(lambda: not evaluations._running)
            evaluations.finish()
    (one,), rest = checkpoints(job.output)
    assert (one.uri, one.waits, rest) == (waiting, False, {})
    step = int(one.metrics["step"])
    assert _points(job.run, VALIDATION_LOSS) == [(step, one.metrics[VALIDATION_LOSS])]


def _until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


class _Disturbed(io.StringIO):
    """Output of a training in this process that is interrupted.

    The worker is killed in its second epoch, and the command stopped once an epoch is evaluated.
    """

    killed = stopped = False

    def write(self, text: str) -> int:
        if "epoch 2/3  step" in text and not self.killed:
            self.killed = True
            processes(os.getpid(), "ray::RayTrainWorker")[-1].kill()
        if "  validation  mAP" in text and not self.stopped:
            self.stopped = True
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def _kill_first(name: str, killed: list[int], end: threading.Event) -> None:
    """Kill the first descendant of this process with a name."""
    while not killed and not end.is_set():
        for process in processes(os.getpid(), name):
            process.kill()
            killed.append(process.pid)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("ray_instance")
def test_a_run_that_lost_processes_and_was_stopped_ends_with_the_same_results(
    tiny_set: Path, tiny_plan: Plan, tmp_path: Path
) -> None:
    command = (
        "toy",
        "--data.annotations", str(tiny_set / "annotations.json"),
        "--data.videos", str(tiny_set / "videos"),
        "--data.size", "32", "--data.window.frames", "64",
        "--model.weights", "None", "--model.localizer.width", "16",
        "--model.localizer.heads", "2", "--model.localizer.levels", "3",
        "--model.localizer.head-width", "16",
        "--epochs", "3", "--evaluate-from", "2", "--batch-size", "3", "--scale.workers", "1",
    )  # fmt: skip
    script = ROOT / "pipelines" / "train.py"
    with_option = (*command, "--scale.validation-workers", "3")
    killed: list[int] = []
    end, printed = threading.Event(), _Disturbed()
    killer = threading.Thread(target=_kill_first, args=("ray::evaluate_waiting", killed, end))
    killer.start()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stopped:
            run_here(script, *with_option, folder=tmp_path, printed=printed)
    finally:
        end.set()
        killer.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stopped.value.code == 128 + signal.SIGINT
    assert killed
    assert printed.killed
    assert "2 of 3 evaluations at a time fit beside the training" in printed.getvalue()
    # what waits is evaluated without the option too, and it is the same run
    again = run_here(script, *command, folder=tmp_path)
    assert "going on with the unfinished run" in again
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 're2tal'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    recipe = replace(parse(list(command)), output=str(tmp_path))
    runtime = LocalRuntime(recipe, tiny_plan, tmp_path / "alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as the only worker of a node has
    try:
        _trained(DetectionTask(recipe=recipe, plan=tiny_plan), runtime)
    finally:
        torch.set_num_threads(threads)
    expected = _evaluations(runtime.history)
    assert len(expected) == 2
    run = Run(uri=f"sqlite:///{tmp_path}/runs/mlflow.db", run_id=found.info.run_id)
    for name in next(iter(expected.values())):
        points = [(step, metrics[name]) for step, metrics in expected.items()]
        assert _points(run, name) == points, name
    best = max(metrics[MAP] for metrics in expected.values())
    assert found.data.tags[BEST_MAP] == str(best)
    place = tmp_path / "runs" / found.info.run_id
    kept, rest = checkpoints(str(place))
    assert rest == {}
    assert not any(one.waits for one in kept)
    models = client.search_logged_models([experiment.experiment_id])
    assert len(models) == len(kept)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("ray_instance")
def test_an_evaluation_that_fails_ends_the_training_at_once(
    task: DetectionTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = ScaleConfig(gpu=False, cpus_per_worker=0.5, validation_workers=1)
    recipe = replace(task.recipe, epochs=10_000, scale=scale)
    task = replace(task, recipe=recipe)
    _damage([*task.plan.training[:1], *task.plan.validation[:1]])
    run = start_run(recipe, output=recipe.output)
    with pytest.raises(UserError, match=r"2 of 5 videos cannot be used"):
        fit(task, run)
    assert "epoch 1/10000  step" in capsys.readouterr().out
    _until(lambda: not processes(os.getpid(), "ray::RayTrainWorker"))
    kept, _ = checkpoints(f"{recipe.output}/{run.run_id}")
    assert kept[-1].metrics["epoch"] < recipe.epochs
    assert all(one.waits for one in kept)
