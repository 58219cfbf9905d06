"""A team's MLflow server for tests, as `cluster/mlflow/serve.py` starts it, with PostgreSQL."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from pipelines.core.cluster import free_port
from tests.cluster.postgres import running_postgres

SCRIPT = Path(__file__).parents[2] / "cluster" / "mlflow" / "serve.py"
ADMIN = "an-admin-password"
PASSWORDS = {"ann": "ann-has-a-password", "bob": "bob-has-a-password"}


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        uri: its address.
        database: its database's URI.
        artifacts: where it keeps artifacts.
        log: what it wrote.
        folder: for temporary files.
    """

    uri: str
    database: str
    artifacts: Path
    log: Path
    folder: Path

    def login(self, name: str) -> dict[str, str]:
        """The environment of a job of one of its users.

        Args:
            name: one of `PASSWORDS`.
        """
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": PASSWORDS[name],
        }


def settings(**changes: str) -> dict[str, str]:
    """Variables with which the server could start, as far as `serve.check` can tell."""
    return {
        "MLFLOW_BACKEND_STORE_URI": "postgresql://mlflow@host/mlflow",
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://bucket/mlflow",
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "key",
        "MLFLOW_SERVER_ALLOWED_HOSTS": "localhost:*",
    } | changes


@contextmanager
def running_server(folder: Path, address: str = "127.0.0.1") -> Iterator[Server]:
    """Starts PostgreSQL and a server with two users.

    Args:
        folder: for artifacts, log and temporary files; it is made.
        address: of this machine, at which the server is to be reached.
    """
    artifacts, log, temporary = folder / "artifacts", folder / "log", folder / "tmp"
    temporary.mkdir(parents=True)
    with running_postgres() as database:
        port = free_port()
        server = Server(f"http://{address}:{port}", database, artifacts, log, temporary)
        environment = os.environ | settings(
            MLFLOW_BACKEND_STORE_URI=database,
            MLFLOW_ARTIFACTS_DESTINATION=str(artifacts),
            MLFLOW_HOST=address,
            MLFLOW_PORT=str(port),
            MLFLOW_WORKERS="1",
            MLFLOW_SERVER_ALLOWED_HOSTS=f"{address}:{port}",
            TMPDIR=str(temporary),
        )
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT)],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait(process, server)
            _make_users(server)
            yield server
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait(process: "subprocess.Popen[bytes]", server: Server) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(f"{server.uri}/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not start: {server.log.read_text()}")


def _make_users(server: Server) -> None:
    for name, password in PASSWORDS.items():
        answer = requests.post(
            f"{server.uri}/api/2.0/mlflow/users/create",
            json={"username": name, "password": password},
            auth=("admin", ADMIN),
            timeout=30,
        )
        answer.raise_for_status()
