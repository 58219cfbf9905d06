"""Locks and notes of processes with one output: which may begin, and whose runs have ended."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipelines.config.command_line import told_shortly
from pipelines.core import cluster, tracking, underway
from pipelines.core.tracking import Run, finishing, open_store, start_run, take_up
from re2tal.errors import UserError
from tests.pipelines.ray_head import environment
from tests.pipelines.test_tracking import Outer

HOLDS = """
import sys
from pipelines.core import underway
output, run_id = sys.argv[1:]
underway.begin(output, run_id)
print("began", flush=True)
sys.stdin.read()
"""
STARTS = """
import dataclasses, sys
from pipelines.core.tracking import start_run
config = dataclasses.make_dataclass("Config", ["name", "experiment"])("small", "tests")
print("ready", flush=True)
sys.stdin.readline()
print(start_run(config, output=sys.argv[1]).run_id)
"""


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _process(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a process, and return it once it has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(Path()),
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


@contextmanager
def _held(output: Path, run: Run) -> Iterator[Callable[[], None]]:
    """Let another process work on a run; yield a function that kills that process."""
    underway.end(run.run_id)  # it is no longer this process's

    def kill() -> None:
        process.kill()
        process.wait()

    with _process(HOLDS, str(output), run.run_id) as process:
        yield kill
        kill()


def _status(run: Run) -> str:
    return str(run.client.get_run(run.run_id).info.status)


def test_the_run_of_a_process_that_was_killed_is_ended_by_the_next_command(tmp_path: Path) -> None:
    killed, alive = (start_run(Outer(), output=tmp_path) for _ in range(2))
    elsewhere = start_run(Outer(), output=tmp_path / "other")
    mine = start_run(Outer(), output=tmp_path)
    with _held(tmp_path, alive), _held(tmp_path, killed) as kill:
        open_store("another experiment", output=tmp_path)
        assert _status(killed) == _status(alive) == "RUNNING"
        assert underway.is_under_way(tmp_path, killed.run_id)
        kill()
        open_store("another experiment", output=tmp_path)
        assert _status(killed) == "KILLED"
        assert _status(alive) == _status(mine) == _status(elsewhere) == "RUNNING"
    assert set(underway.left_behind(tmp_path)) == {alive.run_id}


def test_a_run_in_another_store_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(Outer(), output=tmp_path)
    underway.leave(run.run_id)
    other = start_run(Outer(), output=tmp_path / "team").uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    open_store("tests", output=tmp_path)
    assert _status(run) == "RUNNING"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    open_store("tests", output=tmp_path)
    assert _status(run) == "KILLED"
    assert underway.left_behind(tmp_path) == {}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": "UNKNOWN"}'])
def test_a_note_that_was_cut_off_is_of_a_run_that_was_killed(tmp_path: Path, content: str) -> None:
    run = start_run(Outer(), output=tmp_path)
    underway.end(run.run_id)
    (tmp_path / underway.FOLDER / f"{run.run_id}.json").write_text(content)
    open_store("tests", output=tmp_path)
    assert _status(run) == "KILLED"


def _fail(*_: object, **__: object) -> None:
    raise MlflowException("database or disk is full\nand much more")


def test_the_same_work_is_done_by_one_process_at_a_time(tmp_path: Path) -> None:
    first = start_run(Outer(), output=tmp_path, once=True)
    assert start_run(Outer(), output=tmp_path, once=True) != first  # this process's own
    note = tmp_path / underway.FOLDER / f"{first.run_id}.json"
    content = note.read_text()
    with _held(tmp_path, first) as kill:
        note.write_text(content)  # of that process
        told = rf"under way in process \d+ on .*, since 20.*: MLflow run {first.run_id} in sqlite"
        with pytest.raises(UserError, match=told):
            start_run(Outer(), output=tmp_path, once=True)
        assert start_run(Outer(name="other"), output=tmp_path, once=True)
        assert start_run(Outer(), output=tmp_path)
        kill()
        assert start_run(Outer(), output=tmp_path, once=True)
        assert _status(first) == "KILLED"


def test_a_tracker_that_fails_does_not_hide_the_error_and_is_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(Outer(), output=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_tag", _fail)
        patch.setattr(MlflowClient, "set_terminated", _fail)
        with pytest.raises(SystemExit) as ended, told_shortly(), finishing(run):
            raise UserError("The loss is not finite.")
    first, second = str(ended.value.code).splitlines()
    assert first == "error: The loss is not finite."
    assert "could not record that the run is FAILED (database or disk is full)" in second
    assert _status(run) == "RUNNING"
    start_run(Outer(), output=tmp_path)
    assert _status(run) == "FAILED"
    tags = run.client.get_run(run.run_id).data.tags
    assert tags["error"] == "UserError: The loss is not finite."
    assert underway.left_behind(tmp_path) == {}


def test_a_tracker_that_fails_at_the_end_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run(Outer(), output=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", _fail)
        with finishing(run):
            assert _status(run) == "RUNNING"
    assert "warning: MLflow could not record that the run is FINISHED" in capsys.readouterr().err
    open_store("tests", output=tmp_path)
    assert _status(run) == "FINISHED"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit(1)])
def test_to_be_stopped_is_no_error(tmp_path: Path, stop: BaseException) -> None:
    run = start_run(Outer(), output=tmp_path)
    with pytest.raises((KeyboardInterrupt, SystemExit)), finishing(run):
        raise stop
    assert _status(run) == "KILLED"
    assert "error" not in run.client.get_run(run.run_id).data.tags
    take_up(run, output=tmp_path)
    assert _status(run) == "RUNNING"
    with finishing(run):
        assert (tmp_path / underway.FOLDER / f"{run.run_id}.json").exists()
    assert not (tmp_path / underway.FOLDER / f"{run.run_id}.json").exists()


def test_a_process_that_is_ended_from_within_ends_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "_mine", {})  # those of other tests
    runs = [start_run(Outer(), output=tmp_path) for _ in range(2)]
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    cluster._give_up("Ray's head process is gone.")
    assert codes == [1]
    assert "error: Ray's head process is gone.\n" in capsys.readouterr().err
    for run in runs:
        assert _status(run) == "FAILED"
        tags = run.client.get_run(run.run_id).data.tags
        assert tags["error"] == "Ray's head process is gone."
    assert underway.left_behind(tmp_path) == {}
    assert tracking.end_all("FAILED", error="") == []


@pytest.mark.slow
def test_two_first_starts_make_one_store(tmp_path: Path) -> None:
    output = str(tmp_path / "runs")
    with ExitStack() as stack:
        starts = [stack.enter_context(_process(STARTS, output)) for _ in range(2)]
        ended = []
        threads = [
            threading.Thread(target=lambda one=one: ended.append(one.communicate("\n")))
            for one in starts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [one.returncode for one in starts] == [0, 0]
    client, _, experiment = open_store("tests", output=output)
    runs = client.search_runs([experiment])
    assert {run.info.run_id for run in runs} == {printed.strip() for printed, _ in ended}
    # they did not end their runs
    assert {run.info.status for run in runs} == {"KILLED"}


def test_one_process_at_a_time_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
import sys
from pipelines.core import underway
with underway.alone(sys.argv[1]):
    print("in", flush=True)
    sys.stdin.read()
"""
    monkeypatch.setattr(underway, "_PATIENCE", 0.0)
    with _process(code, str(tmp_path)) as other:
        timer = threading.Timer(0.5, other.kill)
        timer.start()
        with underway.alone(tmp_path), underway.alone(tmp_path):
            timer.join()  # only once the other was killed
            assert other.wait(10) != 0
    assert f"waiting for the process that opens {tmp_path}" in capsys.readouterr().err


def test_an_object_store_has_no_locks() -> None:
    with underway.alone("s3://bucket/runs"):
        underway.begin("s3://bucket/runs", "a")
    assert not underway.leave("a", status="FAILED")
    assert underway.left_behind("s3://bucket/runs") == {}
    assert not underway.is_under_way("s3://bucket/runs", "a")


def test_a_folder_of_another_user_has_a_lock_and_no_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o1777)
    with underway.alone(tmp_path):
        assert (tmp_path / underway.FOLDER).stat().st_mode == tmp_path.stat().st_mode
    opened = Path.open

    def readable(path: Path, mode: str = "r", **more: Any) -> Any:
        if mode == "ab+":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, **more)

    monkeypatch.setattr(Path, "open", readable)
    with underway.alone(tmp_path):
        underway.begin(tmp_path, "a")
    assert not underway.leave("a", status="FAILED")
    assert underway.left_behind(tmp_path) == {}
