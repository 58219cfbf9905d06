"""Every check says what is wrong, where, and what to do; a sound machine has nothing to mend."""

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pynvml
import pytest
import ray
import sqlalchemy
import torch
from mlflow.entities import ViewType
from ray.exceptions import GetTimeoutError, RayError, WorkerCrashedError
from sqlalchemy.exc import SQLAlchemyError

from pipelines import doctor
from pipelines.core.cluster import free_port
from pipelines.core.tracking import Run, open_store
from pipelines.data.shards import FOLDER
from pipelines.diagnostics import frames, machines, nodes, packages, writing
from pipelines.diagnostics.findings import (
    Finding,
    fail,
    note,
    ok,
    reason,
    run_check,
    summary,
    within,
)
from pipelines.diagnostics.nodes import DRIVER, Answer, Cluster, Node
from re2tal.reversible.convolutions import wrong_gradients

ROOT = Path(__file__).parents[2]
GIB = 2**30
ONE = Node(id="1", name="one (10.0.0.1)", cpus=8, gpus=0, store=8 * GIB, folder="/tmp/ray/s")
TWO = replace(ONE, id="2", name="two (10.0.0.2)")
NO_NODES = Cluster(seconds=5)


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


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cluster]:
    """A cluster whose nodes answer whatever they are asked with what is given."""

    def make(*answers: Answer[Any]) -> Cluster:
        monkeypatch.setattr(Cluster, "ask", lambda *_, **__: list(answers))
        return Cluster(nodes=tuple(answer.node for answer in answers), seconds=5)

    return make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A cluster whose two nodes are this process."""

    def ask(self: Cluster, function: Callable[..., Any], *arguments: Any) -> list[Answer[Any]]:
        return [nodes.attempt(function, node, arguments) for node in self.nodes]

    monkeypatch.setattr(Cluster, "ask", ask)
    return Cluster(nodes=(ONE, TWO), seconds=5)


# --- the report, and checks that hang or break ---


def test_findings_are_lines_and_the_exit_code_tells_of_failures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.show([("a", ok("x")), ("b", note("y"))]) == 0
    assert doctor.show([("a", ok("x")), ("storage", fail("broken\n  in two lines"))]) == 1
    assert "FAIL  storage     broken in two lines\n" in capsys.readouterr().out
    assert summary([ok(""), note(""), note("")]) == "Nothing to mend (1 ok, 2 to know)."
    assert summary([ok(""), fail("")]).startswith("1 to mend (1 ok, 0 to know)")


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


def test_a_check_that_hangs_or_breaks_is_a_failure_and_others_pass_through() -> None:
    hanging = threading.Event()
    try:
        text = _only(run_check(lambda: [ok(str(hanging.wait()))], seconds=0.05))
    finally:
        hanging.set()
    assert "no answer within 0.05 s" in text
    assert "--timeout" in text

    def broken() -> Iterator[Finding]:
        yield ok("so far")
        raise LookupError("no such thing")

    assert "LookupError: no such thing" in _only(run_check(broken, seconds=5))
    assert run_check(lambda: [ok("fine")], seconds=5) == [ok("fine")]
    with pytest.raises(TimeoutError, match="of the function"):
        within(5, lambda: (_ for _ in ()).throw(TimeoutError("of the function")))


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


@pytest.fixture
def needed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(packages, "requires", lambda _: STATED)
    return packages.requirements()


def test_versions_in_their_ranges_are_listed(needed: list[str]) -> None:
    text = _only(packages.check_versions(needed, python="3.11.7", find=INSTALLED.get), "ok")
    assert "Python 3.11.7, torch 2.15.0+cpu, ray 2.60.0, optuna 5.0.0, av 18.1.0" in text
    assert "all 4 packages" in text
    newer = {**INSTALLED, "torch": "2.16.0.dev20261101"}
    assert _only(packages.check_versions(needed, find=newer.get), "ok")


@pytest.mark.parametrize(
    ("name", "version", "told"),
    [
        ("torch", "2.10.1", "torch 2.10.1 is installed, but re2tal needs torch>=2.11"),
        ("av", "19.0.0", "av 19.0.0 is installed, but re2tal needs av<19,>=15"),
        ("ray", "2.9.3", "ray 2.9.3 is installed, but re2tal needs ray<3,>=2.60"),
    ],
)
def test_a_version_out_of_its_range_fails(
    name: str, version: str, told: str, needed: list[str]
) -> None:
    found = {**INSTALLED, name: version}
    python, text = _told(packages.check_versions(needed, python="3.10.4", find=found.get))
    assert "This is Python 3.10.4, but re2tal needs >=3.11" in python
    assert told in text
    assert f"`pip install '{name}" in text


def test_missing_packages_are_told(needed: list[str]) -> None:
    found: dict[str, str] = {name: "1" for name in INSTALLED if name not in ("ray", "optuna")}
    text = _only(packages.check_missing(needed, find=found.get))
    assert "Not installed: optuna<6,>=5, ray[data,train]<3,>=2.60." in text
    assert packages.check_missing(needed, find=INSTALLED.get) == []


def test_the_installed_project_states_the_ranges_and_one_that_is_not_is_told() -> None:
    assert "all" in _only(packages.check_versions(packages.requirements()), "ok")
    assert packages.requirements("re2tal-is-not-there") == []
    text = _only(packages.check_versions([], project="re2tal-is-not-there"))
    assert "is not installed in this Python" in text


def test_the_doctor_needs_only_the_standard_library_to_tell_of_missing_packages() -> None:
    code = (
        "import sys\n"
        "class Nothing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('ray', 'tyro', 'torch', 'mlflow', 'packaging'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "from pipelines import doctor\n"
        "doctor.requirements = lambda: ['ray>=2', 'surely-not-there>=1']\n"
        "sys.exit(doctor.main([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "FAIL  versions    Not installed: surely-not-there>=1." in done.stdout


# --- the same software on every node ---


def test_nodes_with_the_same_software_are_one_line(asked: Cluster) -> None:
    text = _only(machines.check_software(asked), "ok")
    assert "The same on the driver and all 2 nodes: Python 3." in text


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Python", "install the same version on both"),
        ("torch", "install the same version on both"),
        (machines.CODE, "`ray job submit --working-dir .`"),
    ],
)
def test_a_node_with_other_software_is_told(
    name: str, told: str, answering: Callable[..., Cluster]
) -> None:
    here = machines.software(DRIVER)
    other = Answer(node=TWO, value={**here, name: "other"})
    text = _only(machines.check_software(answering(Answer(node=ONE, value=here), other)))
    assert f"two (10.0.0.2) has {name} other, but the driver {here[name]}" in text
    assert told in text


def test_a_node_that_cannot_run_the_project_is_told(answering: Callable[..., Cluster]) -> None:
    broken: Answer[Any] = Answer(node=TWO, error="No module named 're2tal'")
    text = _only(machines.check_software(answering(broken)))
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
        return machines.fingerprint([package.name])

    first = fingerprint()
    (package / "notes.txt").write_text("no code")
    assert fingerprint() == first
    (package / "inner" / "a.py").write_text("x = 2\n")
    second = fingerprint()
    (package / "inner" / "a.py").rename(package / "inner" / "b.py")
    assert len({first, second, fingerprint()}) == 3
    code = machines.software(DRIVER)[machines.CODE]
    assert code == machines.fingerprint(["re2tal", "pipelines"])


# --- machines ---

SOUND = machines.Machine(
    threads=8,
    cores=4,
    memory=32 * GIB,
    memory_used=0.3,
    shm=16 * GIB,
    disk=100 * GIB,
    disk_free=50 * GIB,
)


def test_sound_machines_are_a_line_of_facts_each(answering: Callable[..., Cluster]) -> None:
    unseen: Answer[Any] = Answer(node=TWO, error="no answer within 60 s")
    first, second = machines.check_machines(answering(Answer(node=ONE, value=SOUND), unseen))
    assert first.verdict == "ok"
    for fact in ("8 CPUs for Ray", "8 threads on 4 cores", "32.0 GiB of memory", "16.0 GiB"):
        assert fact in first.text
    assert second == fail("two (10.0.0.2) was not seen: no answer within 60 s.")


@pytest.mark.parametrize(
    ("node", "changed", "verdict", "told"),
    [
        (ONE, {"shm": 64 * 2**20}, "note", "more than its /dev/shm of 0.1 GiB"),
        (ONE, {"disk_free": 3 * GIB}, "FAIL", "has 3.0 GiB of 100.0 GiB free"),
        (ONE, {"disk_free": 8 * GIB}, "note", "start Ray with --temp-dir"),
        (ONE, {"memory_used": 0.97}, "FAIL", "97% of the memory of one (10.0.0.1) is in use"),
        (replace(ONE, cpus=16), {}, "note", "offers 16 CPUs, but has 8 threads"),
        (ONE, {"wrong_gradients": True}, "note", "wrong weight gradients of 3-D convolutions"),
        (replace(ONE, store=0.1 * GIB), {}, "FAIL", "store of 0.1 GiB, but windows of 128 frames"),
        (replace(ONE, store=0.1 * GIB), {}, "FAIL", "(ray start --object-store-memory)"),
        (replace(ONE, store=0.1 * GIB), {}, "FAIL", "(--shm-size;"),
        (replace(ONE, store=0.5 * GIB), {}, "note", "Ray will spill them to the disk"),
    ],
)
def test_what_is_short_on_a_machine_is_told(
    node: Node, changed: dict[str, Any], verdict: str, told: str
) -> None:
    facts, problem = machines.judge_machine(node, replace(SOUND, **changed))
    assert facts.verdict == ("note" if verdict == "FAIL" else "ok")
    assert problem.verdict == verdict
    assert told in problem.text


def test_this_machine_can_be_looked_at(tmp_path: Path) -> None:
    found = machines.examine(replace(ONE, folder=str(tmp_path)))
    assert 0 < found.disk_free < found.disk
    assert found.threads >= 1
    assert 0 < found.memory <= psutil.virtual_memory().total
    assert found.wrong_gradients is wrong_gradients()


# --- GPUs ---

H100 = machines.Gpus(facts="two H100; driver 550.54", count=2, error="")


@pytest.mark.parametrize(
    ("offered", "answer", "verdict", "told"),
    [
        (0, None, "note", "There is no NVIDIA GPU"),
        (2, H100, "ok", "one (10.0.0.1): two H100; driver 550.54."),
        (1, H100, "note", "Ray offers 1 of 2"),
        (2, None, "FAIL", "Ray offers 2 GPUs on one (10.0.0.1), but there is no NVIDIA driver"),
        (2, replace(H100, error="no kernel"), "FAIL", "PyTorch cannot compute on them: no kernel"),
        (2, "no answer", "FAIL", "The GPUs of one (10.0.0.1) were not seen: no answer"),
    ],
)
def test_gpus_are_judged(
    offered: int,
    answer: machines.Gpus | str | None,
    verdict: str,
    told: str,
    answering: Callable[..., Cluster],
) -> None:
    node = replace(ONE, gpus=offered)
    failed = isinstance(answer, str)
    given: Answer[Any] = Answer(
        node=node, value=None if failed else answer, error=str(answer) if failed else ""
    )
    assert told in _only(machines.check_gpus(answering(given)), verdict)


def test_no_gpu_is_a_remark_for_all_nodes_together(answering: Callable[..., Cluster]) -> None:
    none: list[Answer[Any]] = [Answer(node=ONE), Answer(node=TWO)]
    assert "On 2 nodes there is no" in _only(machines.check_gpus(answering(*none)), "note")


def test_a_driver_is_asked_for_its_gpus_and_pytorch_computes_on_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 2,
        "nvmlDeviceGetHandleByIndex": object(),
        "nvmlSystemGetCudaDriverVersion": 12040,
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * GIB, free=79 * GIB),
        "nvmlDeviceGetName": "H100",
        "nvmlSystemGetDriverVersion": "550.54",
    }.items():
        monkeypatch.setattr(pynvml, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sums = {"cuda:0": torch.full((2,), 1.5), "cuda:1": torch.ones(2)}
    monkeypatch.setattr(torch, "ones", lambda _, device: sums[device])
    found = machines.find_gpus(ONE)
    assert found is not None
    memory = "H100 80.0 GiB (79.0 free)"
    assert found.facts.startswith(f"{memory}, {memory}; driver 550.54 for CUDA up to 12.4, PyTorch")
    assert (found.count, found.error) == (2, "GPU 0: 1 + 1 is 3.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def refuses(_: int, device: str) -> None:
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(torch, "ones", refuses)
    found = machines.find_gpus(ONE)
    assert found is not None
    unavailable, first, _ = found.error.split("; ")
    assert unavailable == "torch.cuda.is_available() is false"
    assert first == "GPU 0: no kernel image is available"


# --- the all-reduce ---


@pytest.mark.parametrize(
    ("counts", "pair", "backend"),
    [
        ([(8, 0)], "00", "gloo"),
        ([(8, 1)], "00", "gloo"),
        ([(8, 2)], "00", "nccl"),
        ([(8, 1), (8, 1)], "01", "nccl"),
        ([(8, 4), (8, 0)], "01", "gloo"),
        ([(0, 0), (8, 1), (8, 1)], "12", "nccl"),
    ],
)
def test_two_nodes_are_chosen_and_nccl_where_all_workers_would_have_gpus(
    counts: list[tuple[int, int]], pair: str, backend: str
) -> None:
    those = [replace(ONE, id=str(i), cpus=c, gpus=g) for i, (c, g) in enumerate(counts)]
    assert nodes.choose_pair(those) == (tuple(those[int(i)] for i in pair), backend)


def test_the_bandwidth_and_a_wrong_sum_are_told(answering: Callable[..., Cluster]) -> None:
    well, wrong = (
        [Answer(node=ONE, value=(True, 0.04)), Answer(node=TWO, value=(right, 0.064))]
        for right in (True, False)
    )
    text = _only(nodes.check_all_reduce(answering(*well)), "ok")
    assert "one (10.0.0.1) and two (10.0.0.2), gloo, 64 MiB in 64 ms (1.05 GB/s)" in text
    assert "The sum is wrong" in _only(nodes.check_all_reduce(answering(*wrong)))


def test_workers_that_do_not_meet_fail(answering: Callable[..., Cluster]) -> None:
    late: Answer[Any] = Answer(node=TWO, error="no answer within 60 s")
    text = _only(nodes.check_all_reduce(answering(Answer(node=ONE, value=(True, 1.0)), late)))
    assert "did not get through: no answer within 60 s" in text
    assert "GLOO_SOCKET_IFNAME" in text


# --- the output ---


def test_an_output_that_can_be_used_is_left_as_it_was(tmp_path: Path, asked: Cluster) -> None:
    missing = tmp_path / "not" / "yet" / "there"
    text = _only(writing.check_output(str(missing), NO_NODES), "ok")
    assert text == f"{missing} can be written by the driver."
    assert _everything_in(tmp_path) == []
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "kept").write_text("kept")
    text = _only(writing.check_output(str(tmp_path / "runs"), asked), "ok")
    assert "the driver and all 2 nodes, who see each other's files" in text
    assert _everything_in(tmp_path) == ["runs", "runs/kept"]


def test_what_others_put_into_a_new_output_meanwhile_stays(tmp_path: Path) -> None:
    runs = tmp_path / "a" / "runs"
    with writing.scratch(str(runs)) as folder:
        assert Path(folder).parent == runs
        (runs / "mlflow.db").write_text("a run that has just begun")
    assert _everything_in(tmp_path) == ["a", "a/runs", "a/runs/mlflow.db"]


def test_an_output_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    place = str(tmp_path / "file" / "runs")
    text = _only(writing.check_output(place, NO_NODES))
    assert f"The driver cannot read and write {place} (" in text
    assert "Give --output a folder that can be written." in text
    assert _everything_in(tmp_path) == ["file"]
    assert "cannot read and write nonsense://x/y" in _only(
        writing.check_output("nonsense://x/y", NO_NODES)
    )


def test_a_node_reads_what_the_driver_wrote_and_only_then_writes(tmp_path: Path) -> None:
    assert not writing.exchange(ONE, str(tmp_path / "elsewhere"))
    assert _everything_in(tmp_path) == []
    (tmp_path / "driver").write_bytes(b"something else")
    assert not writing.exchange(ONE, str(tmp_path))
    assert writing.exchange(DRIVER, str(tmp_path))
    assert writing.exchange(ONE, str(tmp_path))
    assert _everything_in(tmp_path) == ["1", "driver"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(node=TWO, value=False), "two (10.0.0.2) does not see what the driver wrote"),
        (Answer(node=TWO, value=False), "a folder that all of them mount, or the URI"),
        (Answer(node=TWO, value=True), "The driver does not see what two (10.0.0.2) wrote"),
        (Answer(node=TWO, error="EACCES"), "two (10.0.0.2) cannot read and write"),
        (Answer(node=TWO, error="EACCES"), "(EACCES). Give --output"),
    ],
)
def test_a_node_that_does_not_share_the_output_fails(
    tmp_path: Path, answer: Answer[bool], told: str, answering: Callable[..., Cluster]
) -> None:
    text = _only(writing.check_output(str(tmp_path), answering(answer)))
    assert str(tmp_path) in text
    assert told in text
    assert _everything_in(tmp_path) == []


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(node=TWO, value=False), "Compare endpoint and credentials"),
        (Answer(node=TWO, error="ACCESS_DENIED"), "set the credentials"),
    ],
)
def test_an_object_store_gets_advice_of_its_own(
    tmp_path: Path, answer: Answer[bool], told: str, answering: Callable[..., Cluster]
) -> None:
    assert told in _only(writing.check_output(f"file://{tmp_path}", answering(answer)))


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
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://me:hunter2@127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _check_mlflow(place: Path | str, cluster: Cluster = NO_NODES) -> list[Finding]:
    return writing.check_mlflow(str(place), cluster)


def test_a_dead_server_fails_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    text = _only(_check_mlflow(tmp_path / "runs"))
    assert text.startswith(f"The driver cannot write to MLflow at {uri}: no server answers there.")
    assert "correct MLFLOW_TRACKING_URI ([Errno" in text
    assert text.endswith("refused).")
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
        text = _only(_check_mlflow(tmp_path))
    assert told in text
    assert "http://me:***@127.0.0.1" in text
    assert "hunter2" not in text


def test_the_default_store_is_tried_beside_where_it_will_be(tmp_path: Path, asked: Cluster) -> None:
    written, shared = _check_mlflow(tmp_path / "runs", asked)
    assert f"written to the default store in {tmp_path / 'runs'} by the driver" in written.text
    assert "2 machines write to" in shared.text
    assert "Prefer a server" in shared.text
    assert (written.verdict, shared.verdict) == ("ok", "note")
    assert _everything_in(tmp_path) == []


@pytest.mark.parametrize("named", [False, True])
def test_a_store_that_is_there_gets_a_finished_run_with_a_tag_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    client, uri, experiment = open_store("mine", output=tmp_path)
    kept, deleted = (client.create_run(experiment).info.run_id for _ in range(2))
    client.delete_run(deleted)
    if named:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    output = tmp_path / "elsewhere" if named else tmp_path
    assert _only(_check_mlflow(output), "ok")

    assert {path.name for path in tmp_path.iterdir()} == {
        "mlflow.db",
        "artifacts",
        ".under-way",
    }
    mine = client.search_runs([experiment], run_view_type=ViewType.ALL)
    assert {run.info.run_id for run in mine} == {kept, deleted}
    others = client.search_experiments(view_type=ViewType.ALL)
    (own,) = (one for one in others if one.name not in ("Default", "mine"))
    assert own.name == "re2tal-doctor"
    (run,) = client.search_runs([own.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["re2tal.doctor"] == "true"
    # whose owner may throw the experiment away
    client.delete_experiment(own.experiment_id)
    assert _only(_check_mlflow(output), "ok")


def test_a_file_that_is_not_there_yet_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert "was not tried" in _only(_check_mlflow(tmp_path), "note")
    run = Run(uri=f"sqlite:///{tmp_path}/there/mlflow.db", run_id="0")
    with pytest.raises(FileNotFoundError, match="is not on this machine: set MLFLOW_TRACKING_URI"):
        writing.write(ONE, run)
    assert _everything_in(tmp_path) == []


def test_what_is_no_data_base_fails(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no data base" * 100)
    assert "file is not a database" in _only(_check_mlflow(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", ".under-way"}


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
    assert "the data base refuses user or password" in _only(_check_mlflow(tmp_path))
    assert len(asked) == 1  # MLflow itself asks for 100 s


def test_a_data_base_that_cannot_be_reached_for_want_of_a_module_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(uri: str) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2@host/db")
    monkeypatch.setattr(sqlalchemy, "create_engine", missing)
    text = _only(_check_mlflow(tmp_path))
    assert "Install it where the driver runs and on every node, such as psycopg[binary]" in text
    assert "hunter2" not in text


def test_an_object_store_alone_cannot_hold_the_runs() -> None:
    assert "name a tracking server" in _only(_check_mlflow("s3://bucket/runs"))


def test_nodes_that_cannot_write_and_artifacts_that_are_lost_are_told(
    tmp_path: Path, answering: Callable[..., Cluster]
) -> None:
    refused: Answer[None] = Answer(node=TWO, error="failed with error code 401 != 200")
    first, second = _told(_check_mlflow(tmp_path, answering(refused, Answer(node=ONE))))
    assert "two (10.0.0.2) cannot write to MLflow at the default store" in first
    assert "the server refuses" in first
    assert "one (10.0.0.1) writes to MLflow at the default store" in second
    assert "but it does not arrive" in second
    assert "--serve-artifacts" in second
    assert _everything_in(tmp_path) == []


# --- videos ---


def test_everybody_decodes_what_the_driver_encoded(asked: Cluster) -> None:
    text = _only(frames.check_video(asked), "ok")
    assert "for the driver and all 2 nodes; at least" in text
    assert re.search(r"at least \d+ frames/s", text)


@pytest.mark.parametrize("length", [0, 400, 6_000])
def test_a_video_that_the_driver_cannot_decode_fails(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = frames.make_video()
    assert length < len(video)
    monkeypatch.setattr(frames, "make_video", lambda: video[:length])
    text = _only(frames.check_video(NO_NODES))
    assert "The driver cannot decode a video that it made" in text
    assert "Install PyAV anew" in text


@pytest.mark.parametrize("change", [lambda one: one[::-1], lambda one: one[:-1]])
def test_another_video_than_was_encoded_fails(
    change: Callable[[np.ndarray], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    video = frames.make_video()
    changed = [change(picture) for picture in frames.pictures()]
    monkeypatch.setattr(frames, "make_video", lambda: video)
    monkeypatch.setattr(frames, "pictures", lambda: iter(changed))
    assert "The driver does not decode what it encoded" in _only(frames.check_video(NO_NODES))


def test_nodes_that_decode_otherwise_fail(answering: Callable[..., Cluster]) -> None:
    here, seconds = frames.decode(DRIVER, frames.make_video(), frames._TIMES)
    off = here.copy()
    off[3, 5, 7, 1] += 2
    answers: list[Answer[frames.Decoded]] = [
        Answer(node=ONE, value=(here, seconds)),
        Answer(node=TWO, value=(off, seconds)),
        Answer(node=TWO, value=(off[:-1], seconds)),
        Answer(node=TWO, error="No module named 'av'"),
    ]
    other, shape, broken = _told(frames.check_video(answering(*answers)))
    assert "two (10.0.0.2) decodes the test video to other frames than the driver" in other
    assert "up to 2 grey levels apart" in other
    assert f"shape {off[:-1].shape} instead of {off.shape}" in shape
    assert "cannot decode the test video: No module named 'av'" in broken


def test_videos_of_the_users_are_decoded_or_told(tmp_path: Path, asked: Cluster) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    places = [str(tmp_path / "nowhere"), str(folder), "nonsense://x"]
    nowhere, empty, nonsense = _told(list(frames.check_own(places, NO_NODES)))
    assert "nothing at" in nowhere
    assert "holds no video" in empty
    assert "--videos nonsense://x cannot be read" in nonsense
    (folder / "b.mp4").write_bytes(b"no video")
    text = _only(list(frames.check_own([str(folder)], NO_NODES)))
    assert "cannot decode the first video of" in text
    (folder / "a.mp4").write_bytes(frames.make_video())
    text = _only(list(frames.check_own([str(folder)], asked)), "ok")
    assert text == f"The same frames of {folder}/a.mp4 for the driver and all 2 nodes."


def test_videos_in_shards_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [
        SimpleNamespace(name="0.parquet", videos={}),
        SimpleNamespace(name="1.parquet", videos={"x": 0}),
    ]
    monkeypatch.setattr(frames, "read_manifest", lambda folder: SimpleNamespace(shards=shards))
    assert frames.first_video(str(tmp_path)) == f"{tmp_path}/{FOLDER}/1.parquet#x"
    shards.pop()
    with pytest.raises(Exception, match="hold none"):
        frames.first_video(str(tmp_path))


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
    monkeypatch.setattr(ray, "nodes", lambda: [dead, entry])
    assert nodes.alive_nodes() == (ONE,)


def test_a_node_that_does_not_answer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(error: Exception) -> Callable[..., Any]:
        def raises(reference: Any, timeout: float) -> Any:
            raise error

        return raises

    task = SimpleNamespace(remote=lambda function, node, arguments: node.id)
    cancelled = []
    monkeypatch.setattr(nodes, "NodeAffinitySchedulingStrategy", lambda *_, **__: None)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: task)
    monkeypatch.setattr(ray, "cancel", lambda one, force: cancelled.append((one, force)))
    monkeypatch.setattr(ray, "get", get(GetTimeoutError()))
    answers = Cluster(nodes=(ONE, TWO), seconds=30).ask(machines.software)
    assert [one.node for one in answers] == [ONE, TWO]
    assert {one.error for one in answers} == {"no answer within 30 s (give more with --timeout)"}
    assert cancelled == [("1", True), ("2", True)]
    monkeypatch.setattr(ray, "get", get(WorkerCrashedError()))
    (answer,) = Cluster(nodes=(ONE,), seconds=30).ask(machines.software)
    assert "died unexpectedly" in answer.error
    assert answer.value is None
    monkeypatch.setattr(ray, "get", get(RayError("No module named 'pipelines'")))
    (answer,) = Cluster(nodes=(ONE,), seconds=30).ask(machines.software)
    assert "ray job submit" in answer.error


def test_errors_on_a_node_come_back_as_text_and_the_drivers_spare_the_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bad(node: Node) -> None:
        raise PermissionError(13, "Permission denied", "/x")

    monkeypatch.setattr(Cluster, "ask", lambda *_: pytest.fail("a node was asked"))
    (answer,) = Cluster(nodes=(ONE,), seconds=5).ask_after_driver(bad)
    assert answer == Answer(node=DRIVER, error="[Errno 13] Permission denied: '/x'")


def test_an_address_at_which_nothing_listens_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with nodes.joined(seconds=5) as (finding, cluster):
        text = _only([finding])
        assert cluster.nodes == ()
    assert f"The cluster at {address} (RAY_ADDRESS) cannot be joined" in text
    assert "ray start --head" in text


def test_a_ray_that_does_not_answer_or_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    monkeypatch.setattr("pipelines.core.cluster.init_ray", hanging.wait)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        with nodes.joined(seconds=0.1) as (finding, _):
            hanging.set()
            assert "no answer within 0.1 s" in _only([finding])
            assert "RAY_AUTH_MODE" in finding.text

    def breaks() -> None:
        raise OSError("no space left")

    monkeypatch.setattr("pipelines.core.cluster.init_ray", breaks)
    monkeypatch.delenv("RAY_ADDRESS")
    with nodes.joined(seconds=0.1) as (finding, _):
        assert "Ray does not start on this machine (no space left)" in _only([finding])


def test_without_ray_and_with_checks_that_break_the_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> list[Finding]:
        raise RuntimeError("broken")

    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setattr(writing, "check_output", broken)
    config = doctor.DoctorConfig(output=str(tmp_path / "runs"), videos=("/nowhere",))
    assert [(name, finding.verdict) for name, finding in doctor.diagnose(config)] == [
        ("versions", "ok"),
        ("ray", "FAIL"),
        *((name, "note") for name in ("software", "machine", "gpu", "all-reduce")),
        ("storage", "FAIL"),
        ("mlflow", "ok"),
        ("video", "ok"),
        ("videos", "FAIL"),
    ]
    assert _everything_in(tmp_path) == []


# --- the script ---


@pytest.mark.slow
def test_a_sound_machine_has_nothing_to_mend_and_nothing_is_left(tmp_path: Path) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    (home / "some.mp4").write_bytes(frames.make_video())
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
    assert "by the driver and the only node" in done.stdout
    assert re.search(r"64 MiB in \d+ ms", done.stdout)
    assert _everything_in(work) == []
    (folder,) = re.findall(r"Ray's files in (\S+)\.$", done.stdout, re.MULTILINE)
    processes = psutil.process_iter(["cmdline"])
    assert [one for one in processes if folder in " ".join(one.info["cmdline"] or [])] == []
