"""A Ray that does not start, or is gone, is reported in one sentence and within seconds."""

import socket
import threading
from collections.abc import Iterator
from unittest.mock import Mock

import pytest
import ray
from ray._private import ray_constants, services

from pipelines.config.command_line import told_shortly
from pipelines.core import cluster
from pipelines.core.cluster import free_port, init_ray, start_limit, unreachable, watch
from re2tal.errors import UserError


def test_whether_something_answers_is_found_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert unreachable(f"127.0.0.1:{port}") == ""
        assert unreachable(f"ray://127.0.0.1:{port}") == ""
    assert "refused" in unreachable(f"127.0.0.1:{port}").lower()


@pytest.mark.parametrize("address", ["auto", "", "local"])
def test_what_is_no_host_and_port_is_left_to_ray(address: str) -> None:
    assert unreachable(address) == ""


def test_a_program_whose_cluster_is_gone_ends_with_one_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests may have a Ray here
    with pytest.raises(UserError):
        init_ray()
    with (
        pytest.raises(SystemExit, match=rf"error: The cluster at {address} \(RAY_ADDRESS\)"),
        told_shortly(),
    ):
        init_ray()


REASONS = {
    "timed out": (
        Exception(
            "The current node timed out during startup. This could happen because some of the "
            "raylet failed to startup or the GCS has become overloaded."
        ),
        "did not answer for 60 s: the machine is too busy",
    ),
    "a port in use": (
        RuntimeError(
            "Failed to start GCS.  Last 1 lines of error files:\n[2026-11-30 08:10:48,651 C 3972 "
            "3972] (gcs_server) grpc_server.cc:134:  An unexpected system state has occurred. You "
            "have likely discovered a bug in Ray. Please report this issue at https://x/issues and "
            "we'll work with you to fix it. Check failed: server_ Failed to start the grpc server. "
            "The specified port is 42525. This means that Ray's core components will not be able "
            "to function correctly.\n\n.Please check /tmp/ray/session/logs/gcs_server.out."
        ),
        "ray stop ends leftover processes of Ray",
    ),
    "the dashboard's port in use": (
        ValueError("Failed to bind to 127.0.0.1:44865 because it's already occupied."),
        "End the program that uses the port",
    ),
    "no shared memory": (
        ValueError("The configured object store size (7.0 GB) exceeds /dev/shm size (0.1 GB)."),
        "--shm-size",
    ),
    "a long path": (
        OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /x"),
        "RAY_TMPDIR",
    ),
    "a full disk": (OSError(28, "No space left on device", "/tmp/ray/session"), "Make room in the"),
    "no words": (ConnectionError(), "ray stop"),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_ray_that_does_not_start_is_one_sentence_with_its_reason(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised, advice = REASONS[name]

    def init(**_: object) -> None:
        raise raised

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_START_SECONDS", 1.0)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(SystemExit) as ended, told_shortly():
        init_ray()
    told = str(ended.value.code)
    assert told.startswith("error: Ray does not start on this machine (")
    assert advice in told
    assert len(told.splitlines()) == 1
    assert len(told) < 800
    assert "discovered a bug" not in told
    words = str(raised).split()[:4] or ["ConnectionError"]
    assert " ".join(words) in told


def test_a_cluster_that_answers_and_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("Version mismatch: the cluster was started with Ray 2.50")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        with pytest.raises(UserError, match=r"cannot be joined \(Version mismatch.*RAY_AUTH_MODE"):
            init_ray()


def test_ray_is_waited_for_as_the_machine_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [start_limit(seconds) for seconds in (2.0, 30.0, 5000.0)] == [60, 180, 600]
    asked = []

    def late(address: str, node: str) -> dict[str, str]:
        asked.append(node)
        if len(asked) < 4:
            raise RuntimeError("no such node")
        return {"node": node}

    class StartedError(Exception):
        pass

    def init(**_: object) -> None:
        assert services.get_node("127.0.0.1:1", "a") == {"node": "a"}
        assert ray_constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S >= 120
        raise StartedError("it is up")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_START_SECONDS", 20.0)
    monkeypatch.setattr(services, "get_node", late)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match="it is up"):
        init_ray()
    assert len(asked) == 4
    assert services.get_node is late  # as Ray has it


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Stand-in for Ray's head process: a port that is open."""
    monkeypatch.setattr(cluster, "_WATCH_SECONDS", 0.01)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listening:
        address = _address(listening)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: Mock(gcs_address=address))
        yield listening


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()
    return f"{host}:{port}"


def _watched(address: str, patience: float) -> tuple[threading.Thread, list[str]]:
    told: list[str] = []
    thread = threading.Thread(target=watch, args=(address, patience, told.append), daemon=True)
    thread.start()
    return thread, told


def test_a_head_process_that_is_gone_is_told_at_once(head: socket.socket) -> None:
    address = _address(head)
    thread, told = _watched(address, 0.0)
    thread.join(0.1)
    assert thread.is_alive()
    assert told == []
    head.close()
    thread.join(10)
    (sentence,) = told
    assert f"Ray's head process at {address} is gone" in sentence
    assert "refused" in sentence.lower()


def test_the_head_of_a_cluster_may_come_back(
    head: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    address = _address(head)
    head.close()
    thread, told = _watched(address, 60.0)
    thread.join(0.2)
    assert thread.is_alive()
    assert told == []
    assert f"warning: the head of the cluster at {address} does not answer" in (
        capsys.readouterr().err
    )


def test_a_ray_that_is_shut_down_is_not_missed(
    head: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread, told = _watched(_address(head), 0.0)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    head.close()
    thread.join(10)
    assert not thread.is_alive()
    assert told == []


@pytest.mark.parametrize("there", [False, True])
def test_a_start_of_ray_is_shown_once(
    there: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[bool] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: there)
    monkeypatch.setattr(cluster, "init_ray", lambda *, trains: begun.append(trains))
    cluster.start_ray(trains=True)
    assert begun == [True]
    assert capsys.readouterr().out == ("" if there else "starting Ray ...\n")


def test_the_port_that_ray_takes_for_itself_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray whose dashboard got it did not start: its metrics had taken it by then."""
    bind, bound = socket.socket.bind, []

    def bind_and_tell(self: socket.socket, address: tuple[str, int]) -> None:
        bind(self, address)
        bound.append(self.getsockname()[1])
        monkeypatch.setattr(cluster, "_DASHBOARD_METRICS", bound[0])

    monkeypatch.setattr(socket.socket, "bind", bind_and_tell)
    assert free_port() == bound[1] != bound[0]
