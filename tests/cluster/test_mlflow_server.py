"""The MLflow server of a team, with PostgreSQL, as `cluster/mlflow/serve.py` starts it."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import requests
import sqlalchemy
from mlflow.exceptions import MlflowException
from psutil import process_iter

from cluster.mlflow.serve import AUTH_SCHEMA, ServerError, auth_settings, check, write_private
from pipelines.core.cluster import free_port
from tests.cluster.files import CLUSTER, documents
from tests.cluster.mlflow_server import ADMIN, PASSWORDS, SCRIPT, Server, running_server, settings
from tests.cluster.postgres import binaries

ARTIFACT = "/api/2.0/mlflow-artifacts/artifacts/1/x"

slow = pytest.mark.slow
needs_postgres = pytest.mark.skipif(
    binaries() is None, reason="PostgreSQL's programs are not installed"
)


@pytest.mark.parametrize("name", sorted(settings()))
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(ServerError, match=name):
        check(settings(**{name: ""}))


def test_all_missing_variables_are_named_at_once() -> None:
    with pytest.raises(ServerError) as error:
        check({})
    assert all(name in str(error.value) for name in settings())


@pytest.mark.parametrize(
    "uri", ["postgresql://mlflow:hidden@host:hidden/mlflow", "hidden", "mysql://a:hidden@host/b"]
)
def test_a_wrong_uri_is_refused_without_showing_it(uri: str) -> None:
    with pytest.raises(ServerError, match="MLFLOW_BACKEND_STORE_URI") as error:
        check(settings(MLFLOW_BACKEND_STORE_URI=uri))
    assert "hidden" not in str(error.value)


def test_the_uris_own_options_stay() -> None:
    url = check(settings(MLFLOW_BACKEND_STORE_URI="postgresql://a@b/c?options=-cx%3D1"))
    assert f"options=-cx%%3D1+-csearch_path%%3D{AUTH_SCHEMA}" in auth_settings(url)


def test_the_file_with_the_uri_is_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = os.umask(0)
    try:
        write_private(path, "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "text"


def test_compose_and_kubernetes_set_all_that_the_server_needs() -> None:
    (compose,) = documents(CLUSTER / "compose.yaml")
    _, deployment = documents(CLUSTER / "kuberay" / "mlflow.yaml")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value", "-") for variable in container["env"]}
    for environment in (compose["services"]["mlflow"]["environment"], variables):
        assert check(environment).host == "postgres"
        assert "PGPASSWORD" in environment
        assert environment["MLFLOW_HOST"] == "0.0.0.0"


@slow
def test_a_database_that_is_not_there_is_told_in_one_line() -> None:
    uri = f"postgresql://mlflow:hidden@127.0.0.1:{free_port()}/mlflow"
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=os.environ | settings(MLFLOW_BACKEND_STORE_URI=uri),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: The database postgresql://mlflow:***@127.0.0.1")
    assert len(done.stderr.splitlines()) == 1
    assert "hidden" not in done.stderr


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("mlflow") / "server") as running:
        yield running


def client_of(name: str, server: Server, patch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    """Returns a client that logs in by environment variables, as a job does."""
    for variable, value in server.login(name).items():
        patch.setenv(variable, value)
    return mlflow.MlflowClient(server.uri)


@slow
@needs_postgres
@pytest.mark.parametrize("login", [None, ("ann", "wrong"), ("bob", ""), ("admin", "password1234")])
def test_without_the_right_password_nothing_is_shown(
    server: Server, login: tuple[str, str] | None
) -> None:
    for path in ("/", "/api/2.0/mlflow/experiments/get?experiment_id=0", "/version", ARTIFACT):
        answer = requests.get(server.uri + path, auth=login, timeout=30)
        assert answer.status_code == 401, path


@slow
@needs_postgres
def test_a_run_and_its_artifacts_go_through_the_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of("ann", server, monkeypatch)
    experiment = client.create_experiment("of ann")
    run = client.create_run(experiment)
    client.log_metric(run.info.run_id, "loss", 1.5)
    path = tmp_path / "weights.txt"
    path.write_text("weights")
    client.log_artifact(run.info.run_id, str(path))

    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert [file.read_text() for file in server.artifacts.rglob("weights.txt")] == ["weights"]
    assert client.get_run(run.info.run_id).data.metrics == {"loss": 1.5}
    back = client.download_artifacts(run.info.run_id, "weights.txt", str(tmp_path / ""))
    assert Path(back).read_text() == "weights"


@slow
@needs_postgres
def test_a_team_logs_to_one_experiment_that_only_its_maker_deletes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = client_of("ann", server, monkeypatch).create_experiment("shared")
    client = client_of("bob", server, monkeypatch)
    client.log_metric(client.create_run(experiment).info.run_id, "loss", 2.0)
    with pytest.raises(MlflowException, match=r"denied|403"):
        client.delete_experiment(experiment)
    client_of("ann", server, monkeypatch).delete_experiment(experiment)


@slow
@needs_postgres
def test_users_are_in_a_schema_of_their_own(server: Server) -> None:
    engine = sqlalchemy.create_engine(server.database)
    inspector = sqlalchemy.inspect(engine)
    assert "users" in inspector.get_table_names(AUTH_SCHEMA)
    assert "users" not in inspector.get_table_names("public")
    assert "runs" in inspector.get_table_names("public")
    engine.dispose()


@slow
@needs_postgres
def test_another_host_name_is_refused(server: Server) -> None:
    answer = requests.get(server.uri, headers={"Host": "elsewhere"}, auth=("admin", ADMIN))
    assert answer.status_code == 403
    assert requests.get(f"{server.uri}/health", headers={"Host": "elsewhere"}).ok


@slow
@needs_postgres
def test_no_secret_is_told(server: Server) -> None:
    password = sqlalchemy.make_url(server.database).password or ""
    secrets = [ADMIN, password, server.database, *PASSWORDS.values()]
    files = list(server.folder.glob("mlflow-auth-*/basic_auth.ini"))
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600]
    commands = [" ".join(process.info["cmdline"] or ()) for process in process_iter(["cmdline"])]
    assert any("basic-auth" in command for command in commands)
    for secret in secrets:
        assert secret not in server.log.read_text()
        assert not any(secret in command for command in commands)
