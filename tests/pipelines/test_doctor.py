"""Every check says what is wrong, where, and what to do; a sound machine has no findings."""

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
from pipelines.core import checkout
from pipelines.core.cluster import free_port
from pipelines.core.tracking import Run, open_store
from pipelines.data.shards import FOLDER
from pipelines.diagnostics import findings as basics
from pipelines.diagnostics import frames, machines, nodes, writing
from pipelines.diagnostics.findings import Finding, fail, note, ok, reason, run_check, within
from pipelines.diagnostics.nodes import DRIVER, Answer, Cluster, Node
from re2tal.reversible.convolutions import wrong_gradients

ROOT = Path(__file__).parents[2]
GIB = 2**30
ONE = Node(id="1", name="one (10.0.0.1)", cpus=8, gpus=0, store=8 * GIB, folder="/tmp/ray/s")
TWO = replace(ONE, id="2", name="two (10.0.0.2)")
NO_NODES = Cluster(seconds=5)
Answering = Callable[..., Cluster]
"""A cluster whose nodes answer whatever they are asked with what is given."""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the environment that the checks change after each test."""
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def tells(findings: Iterator[Finding] | Sequence[Finding], verdict: str, *texts: str) -> str:
    """Require that the only finding has the verdict and the words; return its text."""
    (finding,) = findings
    assert finding.verdict == verdict, finding
    for text in texts:
        assert text in finding.text
    return finding.text


def _everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Answering:
    def make(*answers: Answer[Any]) -> Cluster:
        monkeypatch.setattr(Cluster, "ask", lambda *_, **__: list(answers))
        return Cluster(nodes=tuple(answer.node for answer in answers), seconds=5)

    return make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Cluster whose two nodes are this process."""

    def ask(self: Cluster, function: Callable[..., Any], *arguments: Any) -> list[Answer[Any]]:
        return [nodes.attempt(function, node, arguments) for node in self.nodes]

    monkeypatch.setattr(Cluster, "ask", ask)
    return Cluster(nodes=(ONE, TWO), seconds=5)


# --- answers of nodes, as each check judges them ---

HERE = machines.software(DRIVER)
H100 = machines.Gpus(facts="two H100; driver 550.54", count=2, error="")
BROKEN_H100 = replace(H100, error="no kernel")
ONE_GPU, TWO_GPUS = (replace(TWO, gpus=count) for count in (1, 2))


def output(cluster: Cluster) -> list[Finding]:
    return writing.check_output(str(Path.cwd()), cluster)


def store(cluster: Cluster) -> list[Finding]:
    return writing.check_output(f"file://{Path.cwd()}", cluster)


def tracking(cluster: Cluster) -> list[Finding]:
    return writing.check_mlflow(str(Path.cwd()), cluster)


@pytest.mark.parametrize(
    ("check", "answer", "verdict", "told"),
    [
        (machines.check_software, {"value": HERE}, "ok", ["The same on the driver and the only"]),
        (
            machines.check_software,
            {"value": HERE | {"torch": "other"}},
            "FAIL",
            [f"two (10.0.0.2) has torch other, but the driver {HERE['torch']}: install the same"],
        ),
        (
            machines.check_software,
            {"value": HERE | {machines.CODE: "other"}},
            "FAIL",
            [f"has {machines.CODE} other, but the driver", "`ray job submit --working-dir .`"],
        ),
        (machines.check_software, {"error": "no re2tal"}, "FAIL", ["run the project: no re2tal"]),
        (
            machines.check_machines,
            {"error": "late"},
            "FAIL",
            ["(10.0.0.2) could not be examined: late."],
        ),
        (machines.check_gpus, {}, "note", ["There is no NVIDIA GPU"]),
        (
            machines.check_gpus,
            {"node": TWO_GPUS, "value": H100},
            "ok",
            ["two (10.0.0.2): two H"],
        ),
        (machines.check_gpus, {"node": ONE_GPU, "value": H100}, "note", ["Ray offers 1 of 2"]),
        (
            machines.check_gpus,
            {"node": TWO_GPUS},
            "FAIL",
            ["offers 2 GPUs on two", "no NVIDIA dr"],
        ),
        (machines.check_gpus, {"value": BROKEN_H100}, "FAIL", ["compute on them: no kernel"]),
        (
            machines.check_gpus,
            {"error": "late"},
            "FAIL",
            ["of two (10.0.0.2) could not be examined: late"],
        ),
        (output, {"value": False}, "FAIL", ["does not see what the driver wrote", "of them mount"]),
        (output, {"value": True}, "FAIL", ["The driver does not see what two (10.0.0.2) wrote"]),
        (output, {"error": "EACCES"}, "FAIL", ["cannot read and write", "(EACCES). Give --output"]),
        (store, {"value": False}, "FAIL", ["does not see", "Compare endpoint and credentials"]),
        (store, {"error": "DENIED"}, "FAIL", ["cannot read and write", "set the credentials"]),
        (tracking, {"error": "error code 401"}, "FAIL", ["two", "default store", "server refuses"]),
        (tracking, {}, "FAIL", ["writes to MLflow at", "of it arrives", "--serve-artifacts"]),
    ],
)
def test_what_a_node_answers_is_judged(
    check: Callable[[Cluster], Sequence[Finding]],
    answer: dict[str, Any],
    verdict: str,
    told: list[str],
    answering: Answering,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    tells(check(answering(Answer(**{"node": TWO} | answer))), verdict, *told)
    assert _everything_in(tmp_path) == []


def test_no_gpu_is_a_remark_for_all_nodes_together(answering: Answering) -> None:
    none: list[Answer[Any]] = [Answer(node=ONE), Answer(node=TWO)]
    tells(machines.check_gpus(answering(*none)), "note", "On 2 nodes there is no")


def test_what_came_of_the_all_reduce_is_told(answering: Answering) -> None:
    first = Answer(node=ONE, value=(True, 0.04))

    def check(**second: Any) -> list[Finding]:
        return nodes.check_all_reduce(answering(first, Answer(node=TWO, **second)))

    both = "one (10.0.0.1) and two (10.0.0.2), gloo, 64 MiB in 64 ms (1.05 GB/s)"
    tells(check(value=(True, 0.064)), "ok", both)
    tells(check(value=(False, 0.064)), "FAIL", "The sum is wrong")
    late = "cannot communicate: no answer within 60 s"
    tells(check(error="no answer within 60 s"), "FAIL", late, "GLOO_SOCKET_IFNAME")


def test_nodes_that_decode_otherwise_fail(answering: Answering) -> None:
    here, seconds = frames.decode(DRIVER, frames.make_video(), frames._TIMES)
    off = here.copy()
    off[3, 5, 7, 1] += 2

    def check(**answer: Any) -> list[Finding]:
        return frames.check_video(answering(Answer(node=TWO, **answer)))

    who = "two (10.0.0.2) decodes the test video to other frames than the driver"
    tells(check(value=(here, seconds)), "ok")
    tells(check(value=(off, seconds)), "FAIL", who, "up to 2 grey levels apart")
    shapes = f"shape {off[:-1].shape} instead of {off.shape}"
    tells(check(value=(off[:-1], seconds)), "FAIL", who, shapes)
    tells(check(error="no av"), "FAIL", "two (10.0.0.2) cannot decode the test video: no av")


# --- the report, and checks that hang or break ---


def test_findings_are_lines_and_the_exit_code_tells_of_failures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.show([("a", ok("x")), ("b", note("y")), ("b", note("z"))]) == 0
    assert capsys.readouterr().out.endswith("\nNothing failed (1 ok, 2 notes).\n")
    assert doctor.show([("a", ok("x")), ("storage", fail("broken\n  in two lines"))]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  storage     broken in two lines\n1 failed (1 ok, 0 notes): see" in printed


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
        found = run_check(lambda: [ok(str(hanging.wait()))], seconds=0.05)
    finally:
        hanging.set()
    tells(found, "FAIL", "no answer within 0.05 s", "--timeout")

    def broken() -> Iterator[Finding]:
        yield ok("so far")
        raise LookupError("no such thing")

    tells(run_check(broken, seconds=5), "FAIL", "LookupError: no such thing")
    assert run_check(lambda: [ok("fine")], seconds=5) == [ok("fine")]
    with pytest.raises(TimeoutError, match="of the function"):
        within(5, lambda: (_ for _ in ()).throw(TimeoutError("of the function")))


# --- versions ---

STATED = """
[project]
dependencies = ["torch>=2.11", "av>=15,<19"]
[project.optional-dependencies]
backbones = ["timm>=1.0"]
[dependency-groups]
pipelines = ["optuna>=5,<6", "ray[data,train]>=2.60,<3"]
dev = [{ include-group = "pipelines" }, "pytest>=8"]
"""
INSTALLED = {"torch": "2.15.0+cpu", "av": "18.1.0", "optuna": "5.0.0", "ray": "2.60.0"}


def test_versions_are_compared_with_the_ranges(tmp_path: Path) -> None:
    stated = tmp_path / "pyproject.toml"
    stated.write_text(STATED)
    needed = basics.requirements(stated)

    def check(python: str = "3.11.7", **others: str) -> list[Finding]:
        return basics.check_versions(needed, python=python, find=(INSTALLED | others).get)

    shown = "Python 3.11.7, torch 2.15.0+cpu, ray 2.60.0, optuna 5.0.0, av 18.1.0"
    tells(check(), "ok", shown, "all 4 packages")
    tells(check(torch="2.16.0.dev20261101"), "ok")
    tells(check("3.10.4"), "FAIL", "This is Python 3.10.4, but re2tal needs >=3.11")
    older = "torch 2.10.1 is installed, but re2tal needs torch>=2.11"
    tells(check(torch="2.10.1"), "FAIL", older, "`pip install 'torch")
    tells(check(av="19.0.0"), "FAIL", "av 19.0.0 is installed, but re2tal needs av<19,>=15")
    tells(check(ray="2.9.3"), "FAIL", "ray 2.9.3 is installed, but re2tal needs ray<3,>=2.60")
    there = {name: "1" for name in INSTALLED if name not in ("ray", "optuna")}
    missing = "Not installed: optuna>=5,<6, ray[data,train]>=2.60,<3."
    tells(basics.check_missing(needed, find=there.get), "FAIL", missing)
    assert basics.check_missing(needed, find=INSTALLED.get) == []


def test_the_installed_project_states_the_ranges_and_one_that_is_not_is_told() -> None:
    tells(basics.check_versions(basics.requirements()), "ok", "all")
    absent = basics.check_versions([], project="re2tal-is-not-there")
    tells(absent, "FAIL", "is not installed in this Python")


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


# --- software, hardware and GPUs of the nodes ---


def test_the_fingerprint_changes_with_any_line_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkout.code_fingerprint().startswith(machines.software(DRIVER)[machines.CODE])
    monkeypatch.setattr(checkout, "_ROOT", tmp_path)
    package = tmp_path / "pipelines" / "inner"
    package.mkdir(parents=True)
    (package / "a.py").write_text("x = 1\n")
    first = checkout.code_fingerprint()
    (package / "notes.txt").write_text("no code")
    assert checkout.code_fingerprint() == first
    (package / "a.py").write_text("x = 2\n")
    second = checkout.code_fingerprint()
    (package / "a.py").rename(package / "b.py")
    assert len({first, second, checkout.code_fingerprint()}) == 3


SOUND = machines.Machine(
    threads=8,
    cores=4,
    memory=32 * GIB,
    memory_used=0.3,
    shm=16 * GIB,
    disk=100 * GIB,
    disk_free=50 * GIB,
)


def test_sound_machines_are_a_line_of_facts_each(tmp_path: Path, answering: Answering) -> None:
    facts = ("8 CPUs for Ray", "8 threads on 4 cores", "32.0 GiB of memory", "16.0 GiB")
    tells(machines.check_machines(answering(Answer(node=ONE, value=SOUND))), "ok", *facts)
    here = machines.examine(replace(ONE, folder=str(tmp_path)))
    assert 0 < here.disk_free < here.disk
    assert here.threads >= 1
    assert 0 < here.memory <= psutil.virtual_memory().total
    assert here.wrong_gradients is wrong_gradients()


@pytest.mark.parametrize(
    ("node", "changed", "verdict", "told"),
    [
        (ONE, {"shm": 64 * 2**20}, "note", ["more than its /dev/shm of 0.1 GiB"]),
        (ONE, {"disk_free": 3 * GIB}, "FAIL", ["has 3.0 GiB of 100.0 GiB free"]),
        (ONE, {"disk_free": 8 * GIB}, "note", ["start Ray with --temp-dir"]),
        (ONE, {"memory_used": 0.97}, "FAIL", ["97% of the memory of one (10.0.0.1) is in use"]),
        (replace(ONE, cpus=16), {}, "note", ["offers 16 CPUs, but has 8 threads"]),
        (ONE, {"wrong_gradients": True}, "note", ["wrong weight gradients of 3-D convolutions"]),
        (
            replace(ONE, store=0.1 * GIB),
            {},
            "FAIL",
            ["store of 0.1 GiB, but windows of 128 frames", "--object-store-memory)", "--shm-size"],
        ),
        (replace(ONE, store=0.5 * GIB), {}, "note", ["Ray will spill them to disk"]),
    ],
)
def test_what_is_short_on_a_machine_is_told(
    node: Node, changed: dict[str, Any], verdict: str, told: list[str]
) -> None:
    facts, problem = machines.judge_machine(node, replace(SOUND, **changed))
    assert facts.verdict == ("note" if verdict == "FAIL" else "ok")
    tells([problem], verdict, *told)


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

    def refuses(_: int, device: str) -> None:
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
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


# --- the output ---


def test_an_output_that_can_be_used_is_left_as_it_was(tmp_path: Path, asked: Cluster) -> None:
    missing = tmp_path / "not" / "yet" / "there"
    tells(writing.check_output(str(missing), NO_NODES), "ok", f"{missing} can be written by the")
    assert _everything_in(tmp_path) == []
    kept = tmp_path / "runs" / "kept"
    kept.parent.mkdir()
    kept.write_text("kept")
    all_see = "the driver and all 2 nodes, which see each other's files"
    tells(writing.check_output(str(kept.parent), asked), "ok", all_see)
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
    told = (f"The driver cannot read and write {place} (", "Give --output a writable folder")
    tells(writing.check_output(place, NO_NODES), "FAIL", *told)
    assert _everything_in(tmp_path) == ["file"]
    nonsense = writing.check_output("nonsense://x/y", NO_NODES)
    tells(nonsense, "FAIL", "cannot read and write nonsense://x/y")


def test_a_node_reads_what_the_driver_wrote_and_only_then_writes(tmp_path: Path) -> None:
    assert not writing.exchange(ONE, str(tmp_path / "elsewhere"))
    assert _everything_in(tmp_path) == []
    (tmp_path / "driver").write_bytes(b"something else")
    assert not writing.exchange(ONE, str(tmp_path))
    assert writing.exchange(DRIVER, str(tmp_path))
    assert writing.exchange(ONE, str(tmp_path))
    assert _everything_in(tmp_path) == ["1", "driver"]


# --- MLflow ---


@contextmanager
def _server(status: int) -> Iterator[str]:
    """Run a server that answers every request with a status; yield its URI with a password."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://me:hunter2@127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_dead_server_fails_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    told = (f"The driver cannot write to MLflow at {uri}: no server answers there.", "([Errno")
    text = tells(writing.check_mlflow(str(tmp_path / "runs"), NO_NODES), "FAIL", *told)
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
        found = writing.check_mlflow(str(tmp_path), NO_NODES)
    assert "hunter2" not in tells(found, "FAIL", told, "http://me:***@127.0.0.1")


def test_the_default_store_is_tried_beside_where_it_will_be(tmp_path: Path, asked: Cluster) -> None:
    output = tmp_path / "runs"
    written, shared = writing.check_mlflow(str(output), asked)
    tells([written], "ok", f"written to the default store in {output} by the driver")
    tells([shared], "note", "2 machines write to", "Prefer a server")
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

    output = str(tmp_path / "elsewhere" if named else tmp_path)
    tells(writing.check_mlflow(output, NO_NODES), "ok")

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
    tells(writing.check_mlflow(output, NO_NODES), "ok")


def test_a_file_that_is_not_there_yet_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    tells(writing.check_mlflow(str(tmp_path), NO_NODES), "note", "was not tried")
    run = Run(uri=f"sqlite:///{tmp_path}/there/mlflow.db", run_id="0")
    with pytest.raises(FileNotFoundError, match="is not on this machine: set MLFLOW_TRACKING_URI"):
        writing.write(ONE, run)
    assert _everything_in(tmp_path) == []


def test_data_bases_that_cannot_hold_the_runs_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.db").write_text("this is no data base" * 100)
    tells(writing.check_mlflow(str(tmp_path), NO_NODES), "FAIL", "file is not a database")
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", ".under-way"}
    tells(writing.check_mlflow("s3://bucket/runs", NO_NODES), "FAIL", "name a tracking server")

    def missing(uri: str) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2@host/db")
    monkeypatch.setattr(sqlalchemy, "create_engine", missing)
    advice = "Install it where the driver runs and on every node, such as psycopg[binary]"
    assert "hunter2" not in tells(writing.check_mlflow("runs", NO_NODES), "FAIL", advice)


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
    refused = "the database refuses user or password"
    tells(writing.check_mlflow(str(tmp_path), NO_NODES), "FAIL", refused)
    assert len(asked) == 1  # MLflow itself asks for 100 s


# --- videos ---


def test_the_driver_must_decode_what_it_encoded(
    asked: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tells(frames.check_video(asked), "ok", "for the driver and all 2 nodes; at least")
    assert re.search(r"at least \d+ frames/s", text)
    whole, shown = frames.make_video(), list(frames.pictures())
    for length in (0, 400, 6_000):
        monkeypatch.setattr(frames, "make_video", lambda length=length: whole[:length])
        told = ("The driver cannot decode a video that it made", "Install PyAV anew")
        tells(frames.check_video(NO_NODES), "FAIL", *told)
    monkeypatch.setattr(frames, "make_video", lambda: whole)
    for others in ([one[::-1] for one in shown], [one[:-1] for one in shown]):
        monkeypatch.setattr(frames, "pictures", lambda others=others: iter(others))
        tells(frames.check_video(NO_NODES), "FAIL", "The driver does not decode what it encoded")


def test_videos_of_the_users_are_decoded_or_told(tmp_path: Path, asked: Cluster) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()

    def check(place: Path | str, cluster: Cluster = NO_NODES) -> Iterator[Finding]:
        return frames.check_own([str(place)], cluster)

    tells(check(tmp_path / "nowhere"), "FAIL", "nothing at")
    tells(check(folder), "FAIL", "holds no video")
    tells(check("nonsense://x"), "FAIL", "--videos nonsense://x cannot be read")
    (folder / "b.mp4").write_bytes(b"no video")
    tells(check(folder), "FAIL", "cannot decode the first video of")
    (folder / "a.mp4").write_bytes(frames.make_video())
    same = f"The same frames of {folder}/a.mp4 for the driver and all 2 nodes."
    tells(check(folder, asked), "ok", same)


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
    task = SimpleNamespace(remote=lambda function, node, arguments: node.id)
    cancelled = []
    monkeypatch.setattr(nodes, "NodeAffinitySchedulingStrategy", lambda *_, **__: None)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: task)
    monkeypatch.setattr(ray, "cancel", lambda one, force: cancelled.append((one, force)))

    def asked(error: Exception) -> list[Answer[Any]]:
        def get(reference: Any, timeout: float) -> Any:
            raise error

        monkeypatch.setattr(ray, "get", get)
        return Cluster(nodes=(ONE, TWO), seconds=30).ask(machines.software)

    late = "no answer within 30 s (give more with --timeout)"
    assert asked(GetTimeoutError()) == [Answer(node=ONE, error=late), Answer(node=TWO, error=late)]
    assert cancelled == [("1", True), ("2", True)]
    assert "died unexpectedly" in asked(WorkerCrashedError())[0].error
    assert "ray job submit" in asked(RayError("No module named 'pipelines'"))[0].error


def test_errors_on_a_node_come_back_as_text_and_the_drivers_spare_the_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bad(node: Node) -> None:
        raise PermissionError(13, "Permission denied", "/x")

    monkeypatch.setattr(Cluster, "ask", lambda *_: pytest.fail("a node was asked"))
    (answer,) = Cluster(nodes=(ONE,), seconds=5).ask_after_driver(bad)
    assert answer == Answer(node=DRIVER, error="[Errno 13] Permission denied: '/x'")


def test_a_ray_that_does_not_answer_or_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def joining(*texts: str, seconds: float = 0.1) -> None:
        with nodes.joined(seconds=seconds) as (finding, cluster):
            tells([finding], "FAIL", *texts)
            assert cluster.nodes == ()

    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    told = f"The cluster at {address} (RAY_ADDRESS) cannot be joined"
    joining(told, "ray start --head", seconds=5)

    hanging = threading.Event()
    monkeypatch.setattr("pipelines.core.cluster.init_ray", hanging.wait)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        joining("no answer within 0.1 s", "RAY_AUTH_MODE")
        hanging.set()

    def breaks() -> None:
        raise OSError("no space left")

    monkeypatch.setattr("pipelines.core.cluster.init_ray", breaks)
    monkeypatch.delenv("RAY_ADDRESS")
    joining("Ray does not start on this machine (no space left)")


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
    # a machine that is busy with other tests is slow, not broken
    command = [sys.executable, str(ROOT / "pipelines" / "doctor.py"), "--timeout", "240"]
    command += ["--videos", str(home / "some.mp4")]
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert last.startswith("Nothing failed (")
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
