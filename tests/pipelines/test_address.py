"""A cluster that is gone is told within seconds."""

import socket

import pytest
import ray

from pipelines.config.command_line import told_shortly
from pipelines.core.cluster import free_port, init_ray, unreachable
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
