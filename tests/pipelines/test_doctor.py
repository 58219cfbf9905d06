"""Every check says what is wrong, where, and what to do; a sound machine has nothing to mend."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
import sqlalchemy
from mlflow.entities import ViewType
from ray.exceptions import GetTimeoutError, WorkerCrashedError
from sqlalchemy.exc import SQLAlchemyError

from pipelines import doctor
from pipelines.core.cluster import free_port
from pipelines.core.tracking import Run, open_store
from pipelines.diagnostics import (
    all_reduce,
    cluster,
    examination,
    gpus,
    machine,
    nodes,
    output,
    software,
    tracking,
    versions,
    videos,
)
from pipelines.diagnostics.deadline import within
from pipelines.diagnostics.finding import Finding, fail, note, ok, summary
from pipelines.diagnostics.missing import check_missing
from pipelines.diagnostics.nodes import Answer, Node
from pipelines.diagnostics.reasons import reason
from pipelines.diagnostics.scratch import scratch
from re2tal.reversible.convolutions import wrong_gradients

ROOT = Path(__file__).parents[2]
GIB = 2**30
ONE = Node(id="1", name="one (10.0.0.1)", cpus=8, gpus=0, store=8 * GIB, folder="/tmp/ray/s")
TWO = replace(ONE, id="2", name="two (10.0.0.2)")
SOUND = machine.Machine(
    threads=8,
    cores=4,
    memory=32 * GIB,
    memory_used=0.3,
    shm=16 * GIB,
    disk=100 * GIB,
    disk_free=50 * GIB,
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checks set in the environment is gone after each test."""
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def _told(findings: Sequence[Finding], verdict: str = "FAIL") -> list[str]:
    return [finding.text for finding in findings if finding.verdict == verdict]


def _only(findings: Sequence[Finding], verdict: str = "FAIL") -> str:
    """The text of the only finding, which has the verdict."""
    (finding,) = findings
    assert finding.verdict == verdict, finding
    return finding.text


def _everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- the report ---


def test_a_finding_is_one_line_and_the_last_line_counts_them() -> None:
    assert str(fail("storage", "broken\n  in two lines")) == "FAIL  storage     broken in two lines"
    assert str(ok("ray", "fine")).startswith("ok    ray ")
    assert (
        summary([ok("a", ""), note("b", ""), note("c", "")]) == "Nothing to mend (1 ok, 2 to know)."
    )
    assert summary([ok("a", ""), fail("b", "")]).startswith("1 to mend (1 ok, 0 to know)")


def test_the_exit_code_tells_of_failures(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.show(iter([ok("a", "x"), note("b", "y")])) == 0
    assert doctor.show(iter([ok("a", "x"), fail("b", "z")])) == 1
    assert "FAIL  b           z" in capsys.readouterr().out


def test_the_command_line_is_read() -> None:
    config = doctor.parse(["--output", "s3://b/r", "--videos", "v", "w", "--timeout", "5"])
    assert (config.output, config.videos, config.timeout) == ("s3://b/r", ("v", "w"), 5.0)
    assert doctor.parse([]).output == "runs"


def test_reasons_are_one_line_without_passwords() -> None:
    assert reason(ValueError("a\n b")) == "ValueError: a b"
    assert reason(FileNotFoundError(2, "No such file", "/x")) == "[Errno 2] No such file: '/x'"
    assert reason(RuntimeError()) == "RuntimeError"
    assert "hunter2" not in reason(RuntimeError("postgresql://me:hunter2@host/db refused"))
    assert len(reason(RuntimeError("x" * 5000))) < 500


# --- a check that hangs or breaks ---


def test_a_check_that_hangs_is_given_up_after_the_stated_time() -> None:
    hanging = threading.Event()
    try:
        text = _only(within(0.05, "storage", lambda: [ok("storage", str(hanging.wait()))]))
    finally:
        hanging.set()
    assert "did not end within 0.05 s" in text
    assert "--timeout" in text


def test_a_check_that_breaks_is_a_failure_and_others_pass_through() -> None:
    def broken() -> list[Finding]:
        raise LookupError("no such thing")

    assert "The check itself broke: LookupError: no such thing" in _only(within(5, "x", broken))
    assert within(5, "x", lambda: [ok("x", "fine")]) == [ok("x", "fine")]


# --- versions ---

STATED = (
    "torch>=2.11",
    "av<19,>=15",
    "timm>=1.0; extra == 'backbones'",
    "optuna<6,>=5; extra == 'pipelines'",
    "ray[data,train]<3,>=2.60; extra == 'pipelines'",
    "pytest>=8; extra == 'dev'",
)
INSTALLED = {"torch": "2.15.0+cpu", "av": "18.1.0", "optuna": "5.0.0", "ray": "2.60.0"}


def _check_versions(**changed: str | None) -> list[Finding]:
    found: dict[str, str | None] = {**INSTALLED, **changed}
    return versions.check_versions(
        STATED, requires_python=">=3.11", python="3.11.7", find=found.get
    )


def test_versions_in_their_ranges_are_listed() -> None:
    text = _only(_check_versions(), "ok")
    assert "Python 3.11.7, torch 2.15.0+cpu, ray 2.60.0, optuna 5.0.0, av 18.1.0" in text
    assert "all 4 packages" in text
    assert _only(_check_versions(torch="2.16.0.dev20261101"), "ok")


@pytest.mark.parametrize(
    ("name", "version", "told"),
    [
        ("torch", "2.10.1", "torch 2.10.1 is installed, but re2tal needs torch>=2.11"),
        ("av", "19.0.0", "av 19.0.0 is installed, but re2tal needs av<19,>=15"),
        ("ray", "2.9.3", "ray 2.9.3 is installed, but re2tal needs ray<3,>=2.60"),
        ("optuna", None, "optuna is not installed, but re2tal needs optuna<6,>=5"),
    ],
)
def test_a_version_out_of_its_range_fails(name: str, version: str | None, told: str) -> None:
    text = _only(_check_versions(**{name: version}))
    assert told in text
    assert f"`pip install '{name}" in text


def test_an_old_python_and_an_old_package_are_both_told() -> None:
    findings = versions.check_versions(
        STATED, requires_python=">=3.11", python="3.10.4", find={**INSTALLED, "av": "14.0"}.get
    )
    first, second = _told(findings)
    assert "This is Python 3.10.4, but re2tal needs >=3.11" in first
    assert "av 14.0" in second


def test_missing_packages_are_told_before_anything_is_imported() -> None:
    found: dict[str, str] = {name: "1" for name in INSTALLED if name not in ("ray", "optuna")}
    text = _only(check_missing(STATED, find=found.get))
    assert "Not installed: optuna<6,>=5, ray[data,train]<3,>=2.60." in text
    assert check_missing(STATED, find=INSTALLED.get) == []


def test_the_installed_project_states_the_ranges() -> None:
    assert "all" in _only(versions.check_installation(), "ok")


def test_a_project_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "PROJECT", "re2tal-is-not-there")
    assert "is not installed in this Python" in _only(versions.check_installation())


def test_the_doctor_needs_only_the_standard_library_to_tell_of_missing_packages() -> None:
    code = (
        "import sys\n"
        "class Nothing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('ray', 'tyro', 'torch', 'mlflow', 'packaging'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "from pipelines import doctor\n"
        "doctor.stated_requirements = lambda: ['ray>=2', 'surely-not-there>=1']\n"
        "sys.exit(doctor.main([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "FAIL  versions    Not installed: surely-not-there>=1." in done.stdout


# --- the same software on every node ---

HERE = {"Python": "3.11.7", "ray": "2.60.0", "torch": "2.15.0", software.CODE: "abc"}


def test_nodes_with_the_same_software_are_one_line() -> None:
    answers = [Answer(node=ONE, value=HERE), Answer(node=TWO, value=HERE)]
    assert "all 2 nodes have the same Python 3.11.7" in _only(
        software.check_software(HERE, answers), "ok"
    )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Python", "install the same version on both"),
        ("torch", "install the same version on both"),
        (software.CODE, "`ray job submit --working-dir .`"),
    ],
)
def test_a_node_with_other_software_is_told(name: str, told: str) -> None:
    answers = [Answer(node=ONE, value=HERE), Answer(node=TWO, value={**HERE, name: "other"})]
    text = _only(software.check_software(HERE, answers))
    assert f"two (10.0.0.2) has {name} other, but the driver {HERE[name]}" in text
    assert told in text


def test_a_node_that_cannot_run_the_project_is_told() -> None:
    answer: Answer[dict[str, str]] = Answer(node=TWO, error="No module named 're2tal'")
    text = _only(software.check_software(HERE, [Answer(node=ONE, value=HERE), answer]))
    assert "two (10.0.0.2) cannot run the project: No module named 're2tal'" in text


def test_the_fingerprint_changes_with_any_line_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_package_of_a_test"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "a.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def fingerprint() -> str:
        return software.fingerprint([package.name])

    first = fingerprint()
    (package / "notes.txt").write_text("no code")
    assert fingerprint() == first
    (package / "inner" / "a.py").write_text("x = 2\n")
    second = fingerprint()
    (package / "inner" / "a.py").rename(package / "inner" / "b.py")
    assert len({first, second, fingerprint()}) == 3
    assert software.software()[software.CODE] == software.fingerprint(["re2tal", "pipelines"])


# --- machines ---


def test_a_sound_machine_is_one_line_of_facts() -> None:
    text = _only(machine.check_machine(ONE, SOUND), "ok")
    for fact in ("8 CPUs for Ray", "8 threads on 4 cores", "32.0 GiB of memory", "16.0 GiB"):
        assert fact in text


def test_a_small_object_store_fails_and_a_middling_one_is_noted() -> None:
    findings = machine.check_machine(replace(ONE, store=0.1 * GIB), SOUND)
    (text,) = _told(findings)
    assert "one (10.0.0.1) has an object store of 0.1 GiB, but" in text
    assert "--object-store-memory" in text
    assert "--shm-size" in text
    findings = machine.check_machine(replace(ONE, store=0.5 * GIB), SOUND)
    (text,) = _told(findings, "note")
    assert "Ray will spill them to the disk" in text
    assert _told(findings) == []


@pytest.mark.parametrize(
    ("node", "changed", "verdict", "told"),
    [
        (ONE, {"shm": 64 * 2**20}, "note", "more than its /dev/shm of 0.1 GiB"),
        (ONE, {"disk_free": 3 * GIB}, "FAIL", "has 3.0 GiB of 100.0 GiB free"),
        (ONE, {"disk_free": 8 * GIB}, "note", "start Ray with --temp-dir"),
        (ONE, {"memory_used": 0.97}, "FAIL", "97% of the memory of one (10.0.0.1) is in use"),
        (replace(ONE, cpus=16), {}, "note", "offers 16 CPUs, but has 8 threads"),
        (ONE, {"wrong_gradients": True}, "note", "wrong weight gradients of 3-D convolutions"),
    ],
)
def test_what_is_short_on_a_machine_is_told(
    node: Node, changed: dict[str, Any], verdict: str, told: str
) -> None:
    findings = machine.check_machine(node, replace(SOUND, **changed))
    assert any(told in text for text in _told(findings, verdict)), findings
    assert len(findings) == 2


def test_this_machine_can_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "1")
    monkeypatch.setattr(machine.ray, "get_runtime_context", lambda: context)
    found = machine.examine({"1": str(tmp_path), "2": "/not/there"})
    assert 0 < found.disk_free < found.disk
    assert found.threads >= 1
    assert 0 < found.memory <= psutil.virtual_memory().total
    assert found.wrong_gradients is wrong_gradients()


# --- GPUs ---

H100 = gpus.Gpus(
    driver="550.54",
    cuda="12.4",
    names=("H100", "H100"),
    memory=(80 * GIB, 80 * GIB),
    free=(79 * GIB, 20 * GIB),
    torch="2.15.0, CUDA 12.9",
    error="",
)


def _check_gpus(*found: tuple[Node, gpus.Gpus | None]) -> list[Finding]:
    return gpus.check_gpus([Answer(node=node, value=value) for node, value in found])


def test_no_gpu_is_a_remark_for_all_nodes_together() -> None:
    assert "no NVIDIA GPU" in _only(_check_gpus((ONE, None), (TWO, None)), "note")


def test_gpus_are_listed_and_those_that_ray_does_not_offer_noted() -> None:
    text = _only(_check_gpus((replace(ONE, gpus=2), H100)), "ok")
    assert "H100 80.0 GiB (79.0 free), H100 80.0 GiB (20.0 free); driver 550.54" in text
    assert "Ray offers 1 of 2" in _only(_check_gpus((replace(ONE, gpus=1), H100)), "note")


def test_gpus_without_driver_and_those_pytorch_cannot_use_fail() -> None:
    text = _only(_check_gpus((replace(TWO, gpus=2), None)))
    assert "Ray offers 2 GPUs on two (10.0.0.2), but there is no NVIDIA driver" in text
    broken = replace(H100, error="GPU 0: no kernel image is available")
    text = _only(_check_gpus((replace(ONE, gpus=2), broken)))
    assert "PyTorch (2.15.0, CUDA 12.9) cannot compute on them: GPU 0: no kernel image" in text
    assert "driver 550.54 for CUDA up to 12.4" in text
    answer: Answer[gpus.Gpus | None] = Answer(node=ONE, error="it did not answer within 60 s")
    assert "one (10.0.0.1) were not seen: it did not answer" in _only(gpus.check_gpus([answer]))


def test_a_driver_is_asked_for_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=80 * GIB, free=79 * GIB)
    for name, value in {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 2,
        "nvmlDeviceGetHandleByIndex": object(),
        "nvmlSystemGetCudaDriverVersion": 12040,
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetName": "H100",
        "nvmlSystemGetDriverVersion": "550.54",
    }.items():
        monkeypatch.setattr(pynvml, name, lambda *_, value=value: value)
    told = '{"torch": "2.15.0, CUDA 12.9", "errors": ["GPU 1: out of memory"]}\n'
    done = SimpleNamespace(stdout=f"a warning\n{told}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    found = gpus.find_gpus()
    assert found is not None
    assert (found.cuda, found.names, found.error) == ("12.4", ("H100",) * 2, "GPU 1: out of memory")

    def hangs(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("python", 50)

    monkeypatch.setattr(subprocess, "run", hangs)
    hanging = gpus.find_gpus()
    assert hanging is not None
    assert "did not answer within 50 s" in hanging.error


# --- the output ---


def test_an_output_that_can_be_used_is_left_as_it_was(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "yet" / "there"
    assert "the driver reads what it writes" in _only(
        output.check_output(str(missing), [], seconds=5), "ok"
    )
    assert _everything_in(tmp_path) == []
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "kept").write_text("kept")
    output.check_output(str(tmp_path / "runs"), [], seconds=5)
    assert _everything_in(tmp_path) == ["runs", "runs/kept"]


def test_what_others_put_into_a_new_output_meanwhile_stays(tmp_path: Path) -> None:
    runs = tmp_path / "a" / "runs"
    with scratch(str(runs)) as folder:
        assert Path(folder).parent == runs
        (runs / "mlflow.db").write_text("a run that has just begun")
    assert _everything_in(tmp_path) == ["a", "a/runs", "a/runs/mlflow.db"]


def test_an_output_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    place = str(tmp_path / "file" / "runs")
    text = _only(output.check_output(place, [], seconds=5))
    assert f"The driver cannot read and write {place} (" in text
    assert "Give --output a folder that can be written." in text
    assert _everything_in(tmp_path) == ["file"]
    assert "cannot read and write nonsense://x/y" in _only(
        output.check_output("nonsense://x/y", [], seconds=5)
    )


def test_a_node_reads_what_the_driver_wrote_and_only_then_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_here", lambda: "1")
    assert output.exchange(str(tmp_path / "elsewhere")) == "no"
    assert _everything_in(tmp_path) == []
    (tmp_path / "driver").write_bytes(b"something else")
    assert output.exchange(str(tmp_path)) == "other content"
    assert _everything_in(tmp_path) == ["driver"]
    (tmp_path / "driver").write_bytes(b"what the driver wrote")
    assert output.exchange(str(tmp_path)) == "yes"
    assert _everything_in(tmp_path) == ["1", "driver"]
    output.take_away(str(tmp_path))
    assert _everything_in(tmp_path) == ["driver"]


@pytest.mark.parametrize(
    ("place", "answer", "told"),
    [
        ("/runs", Answer(node=TWO, value="no"), "a folder that all of them mount, or the URI"),
        ("s3://b/r", Answer(node=TWO, value="no"), "Compare endpoint and credentials"),
        ("/runs", Answer(node=TWO, value="other content"), "mount different storage there"),
        ("s3://b/r", Answer(node=TWO, error="ACCESS_DENIED"), "set the credentials"),
        (
            "/runs",
            Answer(node=TWO, error="Permission denied"),
            "(Permission denied). Give --output",
        ),
    ],
)
def test_a_node_that_does_not_share_the_output_fails(
    place: str, answer: Answer[output.Seen], told: str
) -> None:
    text = _only(output.judge(place, [Answer(node=ONE, value="yes"), answer], []))
    assert "two (10.0.0.2)" in text
    assert place in text
    assert told in text


def test_a_file_of_a_node_that_the_driver_does_not_see_fails_and_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ask(to: Sequence[Node], function: Callable[..., Any], *_: Any, seconds: float) -> Any:
        asked.append((function, list(to)))
        return [Answer(node=node, value="yes") for node in to]  # but nothing is written

    monkeypatch.setattr(output, "ask", ask)
    text = _only(output.check_output(str(tmp_path), [ONE], seconds=5))
    assert "The driver does not see what one (10.0.0.1) wrote" in text
    assert asked == [(output.exchange, [ONE]), (output.take_away, [ONE])]
    assert _everything_in(tmp_path) == []


# --- MLflow ---


@contextmanager
def _server(status: int) -> Iterator[str]:
    """A server that answers every request with a status; gives its URI, with a password."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://me:hunter2@127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _check_tracking(place: Path | str) -> list[Finding]:
    return tracking.check_tracking(str(place), [], seconds=5)


def test_a_dead_server_fails_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    text = _only(_check_tracking(tmp_path / "runs"))
    assert text.startswith(f"{uri}: the driver cannot write there: no server answers there (")
    assert "refused). Start it" in text
    assert "correct MLFLOW_TRACKING_URI" in text
    assert _everything_in(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "the server refuses the credentials. Set MLFLOW_TRACKING_USERNAME"),
        (403, "--allowed-hosts"),
    ],
)
def test_wrong_credentials_are_told_without_showing_them(
    status: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _server(status) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        text = _only(_check_tracking(tmp_path))
    assert told in text
    assert "http://me:***@127.0.0.1" in text
    assert "hunter2" not in text


def test_the_default_store_is_tried_beside_where_it_will_be(tmp_path: Path) -> None:
    text = _only(_check_tracking(tmp_path / "runs"), "ok")
    assert f"The default store in {tmp_path / 'runs'}: the driver can write" in text
    assert _everything_in(tmp_path) == []


def test_a_store_that_is_there_is_left_as_it_was(tmp_path: Path) -> None:
    client, _, experiment = open_store("mine", output=tmp_path)
    kept, deleted = (client.create_run(experiment).info.run_id for _ in range(2))
    client.log_text(kept, "mine", "mine.txt")
    model = client.create_logged_model(experiment, name="deleted too").model_id
    client.delete_logged_model(model)
    client.delete_run(deleted)
    before = _everything_in(tmp_path)

    assert _only(_check_tracking(tmp_path), "ok")

    assert _everything_in(tmp_path) == before
    names = {one.name for one in client.search_experiments(view_type=ViewType.ALL)}
    assert names == {"Default", "mine"}
    runs = client.search_runs([experiment], run_view_type=ViewType.ALL)
    assert {run.info.run_id for run in runs} == {kept, deleted}
    # what its owner deleted can still be restored
    store = client._tracking_client.store
    assert [one for one in store._get_deleted_logged_models() if one == model]


def test_what_is_no_data_base_fails(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no data base" * 100)
    assert "file is not a database" in _only(_check_tracking(tmp_path))
    assert _everything_in(tmp_path) == ["mlflow.db"]


def test_a_data_base_that_refuses_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    inspect = sqlalchemy.inspect

    def refuses(subject: Any) -> Any:
        if not isinstance(subject, sqlalchemy.Engine):
            return inspect(subject)
        asked.append(subject)
        raise SQLAlchemyError('password authentication failed for user "me"')

    (tmp_path / "mlflow.db").touch()
    monkeypatch.setattr(sqlalchemy, "inspect", refuses)
    assert "the data base refuses user or password" in _only(_check_tracking(tmp_path))
    assert len(asked) == 1  # MLflow itself asks for 100 s


def test_a_data_base_that_cannot_be_reached_for_want_of_a_module_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(uri: str) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2@host/db")
    monkeypatch.setattr(sqlalchemy, "create_engine", missing)
    text = _only(_check_tracking(tmp_path))
    assert "Install it where the driver runs and on every node, such as psycopg[binary]" in text
    assert "hunter2" not in text


def test_an_object_store_alone_cannot_hold_the_runs() -> None:
    assert "name a tracking server" in _only(_check_tracking("s3://bucket/runs"))


def test_a_node_without_the_file_of_the_store_does_not_make_one(tmp_path: Path) -> None:
    run = Run(uri=f"sqlite:///{tmp_path}/there/mlflow.db", run_id="0")
    with pytest.raises(FileNotFoundError, match="is not on this machine: set MLFLOW_TRACKING_URI"):
        tracking.write(run, "node")
    assert _everything_in(tmp_path) == []


def test_nodes_that_cannot_write_and_artifacts_that_are_lost_are_told() -> None:
    refused: Answer[None] = Answer(node=TWO, error="failed with error code 401 != 200")
    first, second = _told(tracking.judge("http://m", [refused, Answer(node=ONE)], [ONE]))
    assert "http://m: two (10.0.0.2) cannot write there: the server refuses" in first
    assert "what one (10.0.0.1) writes does not arrive" in second
    assert "--serve-artifacts" in second


def test_artifacts_of_a_node_that_do_not_arrive_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(to: Sequence[Node], function: Callable[..., Any], *_: Any, seconds: float) -> Any:
        return [Answer(node=node) for node in to]  # but nothing is written

    monkeypatch.setattr(tracking, "ask", ask)
    text = _only(tracking.check_tracking(str(tmp_path), [ONE], seconds=5))
    assert "what one (10.0.0.1) writes does not arrive" in text
    assert _everything_in(tmp_path) == []


def test_one_file_for_several_machines_is_noted() -> None:
    findings = tracking._well("The default store", "sqlite:////runs/mlflow.db", [ONE, TWO])
    assert [one.verdict for one in findings] == ["ok", "note"]
    assert "Prefer a server" in findings[1].text


# --- the all-reduce ---

REDUCED = all_reduce.Reduced(backend="gloo", nodes=("1", "2"), right=True, seconds=0.064)


@pytest.mark.parametrize(
    ("counts", "backend"),
    [
        ([(8, 0)], "gloo"),
        ([(8, 1)], "gloo"),
        ([(8, 2)], "nccl"),
        ([(8, 1), (8, 1)], "nccl"),
        ([(8, 4), (8, 0)], "gloo"),
        ([(0, 0), (8, 1), (8, 1)], "nccl"),
    ],
)
def test_nccl_is_tried_where_all_workers_would_have_gpus(
    counts: list[tuple[int, int]], backend: str
) -> None:
    nodes = [replace(ONE, id=str(i), cpus=c, gpus=g) for i, (c, g) in enumerate(counts)]
    assert all_reduce.choose_backend(nodes) == backend


def test_the_bandwidth_is_told() -> None:
    finding = all_reduce.judge(REDUCED, [ONE, TWO])
    assert finding.verdict == "ok"
    assert "one (10.0.0.1) and two (10.0.0.2), gloo, 64 MiB in 64 ms (1.05 GB/s)" in finding.text


def test_a_wrong_sum_fails_and_a_network_that_was_not_tried_is_noted() -> None:
    wrong = all_reduce.judge(replace(REDUCED, right=False), [ONE, TWO])
    assert wrong.verdict == "FAIL"
    assert "The sum is wrong" in wrong.text
    alone = replace(REDUCED, nodes=("1", "1"))
    assert all_reduce.judge(alone, [ONE]).verdict == "ok"
    assert "no second node" in _only([all_reduce.judge(alone, [ONE, TWO])], "note")


def test_workers_that_do_not_meet_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(error: Exception) -> Callable[..., Any]:
        def raises(backend: str, *, seconds: float) -> Any:
            raise error

        return raises

    monkeypatch.setattr(all_reduce, "measure", measure(GetTimeoutError()))
    text = _only(all_reduce.check_all_reduce([ONE], seconds=60))
    assert "did not end within 60 s" in text
    assert "GLOO_SOCKET_IFNAME" in text
    monkeypatch.setattr(all_reduce, "measure", measure(TimeoutError("no place with 1 GPU")))
    text = _only(all_reduce.check_all_reduce([replace(ONE, gpus=2)], seconds=60))
    assert "nccl did not get through: no place with 1 GPU" in text
    assert "ray status" in text
    monkeypatch.setattr(all_reduce, "measure", measure(WorkerCrashedError()))
    assert "died unexpectedly" in _only(all_reduce.check_all_reduce([ONE], seconds=60))


# --- videos ---


def test_the_driver_decodes_what_it_encoded() -> None:
    assert "The driver decodes a test video" in _only(
        videos.check_video(videos.make_video(), [], seconds=5), "ok"
    )


def test_a_corrupted_video_fails() -> None:
    text = _only(videos.check_video(b"no video" * 100, [], seconds=5))
    assert "The driver cannot decode a video that it made" in text
    assert "Install PyAV anew" in text


def test_another_video_than_was_encoded_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    content = videos.make_video()
    turned = [picture[::-1] for picture in videos.pictures()]
    monkeypatch.setattr(videos, "pictures", lambda: iter(turned))
    assert "grey levels off what it encoded" in _only(videos.check_video(content, [], seconds=5))


def test_nodes_that_decode_otherwise_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    content = videos.make_video()
    here = videos.decode_made(content)
    off = here.frames.copy()
    off[3, 5, 7, 1] += 2
    answers: list[Answer[videos.Decoded]] = [
        Answer(node=ONE, value=here),
        Answer(node=TWO, value=replace(here, frames=off)),
        Answer(node=TWO, value=replace(here, frames=off[:-1])),
        Answer(node=TWO, error="No module named 'av'"),
    ]
    monkeypatch.setattr(videos, "ask", lambda *_, **__: answers)
    other, shape, broken = _told(videos.check_video(content, [ONE, TWO], seconds=5))
    assert "two (10.0.0.2) decodes the test video to other frames than the driver" in other
    assert "up to 2 grey levels apart" in other
    assert f"shape {off[:-1].shape} instead of {off.shape}" in shape
    assert "cannot decode the test video: No module named 'av'" in broken
    monkeypatch.setattr(videos, "ask", lambda *_, **__: answers[:1])
    assert "frames/s" in _only(videos.check_video(content, [ONE], seconds=5), "ok")


def test_videos_of_the_users_are_decoded_or_told(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    findings = videos.check_own([str(tmp_path / "nowhere"), str(folder)], [], seconds=5)
    nowhere, empty = _told(findings)
    assert "nothing at" in nowhere
    assert "holds no video" in empty
    (folder / "b.mp4").write_bytes(b"no video")
    assert "cannot decode the first video of" in _only(
        videos.check_own([str(folder)], [], seconds=5)
    )
    (folder / "a.mp4").write_bytes(videos.make_video())
    text = _only(videos.check_own([str(folder)], [], seconds=5), "ok")
    assert text == f"The driver decodes {folder}/a.mp4."


def test_videos_in_shards_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [
        SimpleNamespace(name="0.parquet", videos={}),
        SimpleNamespace(name="1.parquet", videos={"x": 0}),
    ]
    monkeypatch.setattr(videos, "read_manifest", lambda folder: SimpleNamespace(shards=shards))
    assert videos.first_video(str(tmp_path)) == f"{tmp_path}/{videos.FOLDER}/1.parquet#x"
    shards.pop()
    with pytest.raises(Exception, match="hold none"):
        videos.first_video(str(tmp_path))


# --- Ray and its nodes ---


def test_nodes_are_read_from_what_ray_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {
        "NodeID": "1",
        "Alive": True,
        "NodeManagerHostname": "one",
        "NodeManagerAddress": "10.0.0.1",
        "ObjectStoreSocketName": "/tmp/ray/s/sockets/plasma_store",
        "Resources": {"CPU": 8.0, "object_store_memory": 8.0 * GIB},
    }
    dead = {**entry, "NodeID": "2", "Alive": False}
    monkeypatch.setattr(nodes.ray, "nodes", lambda: [dead, entry])
    assert nodes.alive_nodes() == [ONE]
    # several on one machine, as in a test of a cluster
    both = [entry, {**entry, "NodeID": "0123456789"}]
    monkeypatch.setattr(nodes.ray, "nodes", lambda: both)
    names = [node.name for node in nodes.alive_nodes()]
    assert names == ["one (10.0.0.1) 012345", "one (10.0.0.1) 1"]


def test_a_node_that_does_not_answer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(error: Exception) -> Callable[..., Any]:
        def raises(reference: Any, timeout: float) -> Any:
            raise error

        return raises

    cancelled = []
    monkeypatch.setattr(nodes, "_start", lambda node, *_: node.id)
    monkeypatch.setattr(nodes.ray, "cancel", lambda one, force: cancelled.append((one, force)))
    monkeypatch.setattr(nodes.ray, "get", get(GetTimeoutError()))
    answers = nodes.ask([ONE, TWO], time.sleep, 1, seconds=30)
    assert [one.error for one in answers] == ["it did not answer within 30 s (--timeout)"] * 2
    assert cancelled == [("1", True), ("2", True)]
    monkeypatch.setattr(nodes.ray, "get", get(WorkerCrashedError()))
    (answer,) = nodes.ask([ONE], time.sleep, 1, seconds=30)
    assert "died unexpectedly" in answer.error
    assert answer.value is None


def test_errors_on_a_node_come_back_as_text() -> None:
    def bad() -> None:
        raise PermissionError(13, "Permission denied", "/x")

    assert nodes._attempt(bad, ()) == (None, "[Errno 13] Permission denied: '/x'")
    assert nodes._attempt(len, ("four",)) == (4, "")
    text = nodes._without_code("ModuleNotFoundError: No module named 'pipelines'")
    assert "ray job submit" in text


def test_an_address_at_which_nothing_listens_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    findings, found = cluster.check_ray(seconds=5)
    text = _only(findings)
    assert f"The cluster at {address} cannot be joined" in text
    assert "ray start --head" in text
    assert found == []


def test_a_cluster_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    monkeypatch.setattr(cluster, "init_ray", hanging.wait)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        findings, _ = cluster.check_ray(seconds=0.1)
    hanging.set()
    assert "it did not answer within 0.1 s" in _only(findings)


def test_without_ray_the_other_checks_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    findings = list(examination.examine_all(str(tmp_path / "runs"), (), seconds=60))
    verdicts = {finding.check: finding.verdict for finding in findings}
    assert verdicts == {
        "ray": "FAIL",
        **dict.fromkeys(("software", "machine", "gpu", "all-reduce"), "note"),
        **dict.fromkeys(("storage", "mlflow", "video"), "ok"),
    }
    assert _everything_in(tmp_path) == []


def test_a_failing_check_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> list[Finding]:
        raise RuntimeError("broken")

    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setattr(examination, "check_output", broken)
    monkeypatch.setattr(examination, "check_tracking", broken)
    findings = list(examination.examine_all(str(tmp_path), ("/nowhere",), seconds=60))
    verdicts = [(finding.check, finding.verdict) for finding in findings[-4:]]
    assert verdicts == [
        ("storage", "FAIL"),
        ("mlflow", "FAIL"),
        ("video", "ok"),
        ("videos", "FAIL"),
    ]


# --- the script ---


@pytest.mark.slow
def test_a_sound_machine_has_nothing_to_mend_and_nothing_is_left(tmp_path: Path) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    (home / "some.mp4").write_bytes(videos.make_video())
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    }
    # a machine that is busy with other tests is slow, not broken
    command = [sys.executable, str(ROOT / "pipelines" / "doctor.py"), "--timeout", "240"]
    command += ["--videos", str(home / "some.mp4")]
    done = subprocess.run(
        command,
        cwd=work,
        env={**kept, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert last.startswith("Nothing to mend (")
    verdicts = {line.split()[1]: line.split()[0] for line in lines}
    well = ("versions", "ray", "software", "machine", "all-reduce", "storage", "mlflow", "video")
    assert set(verdicts) == {*well, "gpu", "videos"}
    assert {verdicts[name] for name in (*well, "videos")} <= {"ok", "note"}
    assert [verdicts[name] for name in ("all-reduce", "storage", "mlflow")] == ["ok"] * 3
    assert "the driver and the node can write" in done.stdout
    assert re.search(r"64 MiB in \d+ ms", done.stdout)
    assert _everything_in(work) == []
    (folder,) = re.findall(r"Ray's files in (\S+)\.$", done.stdout, re.MULTILINE)
    processes = psutil.process_iter(["cmdline"])
    assert [one for one in processes if folder in " ".join(one.info["cmdline"] or [])] == []
