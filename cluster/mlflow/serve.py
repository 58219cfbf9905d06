"""Start a team's MLflow server: users with passwords, PostgreSQL, artifacts through the server.

  python cluster/mlflow/serve.py

All settings are environment variables, because other users of a machine can read a command's
arguments:

  MLFLOW_BACKEND_STORE_URI        postgresql://USER@HOST/DATABASE
  PGPASSWORD                      password of the database, unless the URI contains it
  MLFLOW_ARTIFACTS_DESTINATION    place of the artifacts: s3://BUCKET/mlflow, or a folder
  MLFLOW_AUTH_ADMIN_PASSWORD      password of the first user, who creates the others; used once
  MLFLOW_FLASK_SERVER_SECRET_KEY  key for signing forms; the same for every server of a database
  MLFLOW_SERVER_ALLOWED_HOSTS     names by which clients call the server: mlflow:5000,localhost:*

and, to change the defaults, MLFLOW_AUTH_ADMIN_USERNAME (admin), MLFLOW_HOST (127.0.0.1),
MLFLOW_PORT (5000), MLFLOW_WORKERS (2), and any other variable that `mlflow server` reads.
"""

import configparser
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import sqlalchemy
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

AUTH_SCHEMA = "mlflow_auth"
"""Schema of users and permissions, beside MLflow's tables."""

REQUIRED = {
    "MLFLOW_BACKEND_STORE_URI": "postgresql://USER@HOST/DATABASE",
    "MLFLOW_ARTIFACTS_DESTINATION": "where artifacts are kept, such as s3://BUCKET/mlflow",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "the first user's password, of 12 characters or more",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "any long random text, the same at every start",
    "MLFLOW_SERVER_ALLOWED_HOSTS": "names by which clients call the server, such as mlflow:5000",
}

DEFAULTS = {
    "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
    "MLFLOW_WORKERS": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow's jobs evaluate language models: ten more processes and a gigabyte, of no use here
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


class ServerError(Exception):
    """Reason why the server cannot start, in words without any password."""


def check(environment: Mapping[str, str]) -> URL:
    """Check that all variables are set before anything starts, and return the database's URL.

    Raises:
        ServerError: variables are missing, all of which are listed, or the database's URI is wrong.
    """
    missing = [
        f"{name} ({meaning})" for name, meaning in REQUIRED.items() if not environment.get(name)
    ]
    if missing:
        raise ServerError(f"Not set, or empty: {'; '.join(missing)}.")
    try:
        url = make_url(environment["MLFLOW_BACKEND_STORE_URI"])
    except (ArgumentError, ValueError):
        # without the cause: its message would show the URI
        raise ServerError(
            "MLFLOW_BACKEND_STORE_URI is not a database URI. In a password, write @ / : % as "
            "%40 %2F %3A %25, or set PGPASSWORD instead."
        ) from None
    if url.get_backend_name() != "postgresql":
        raise ServerError(
            f"MLFLOW_BACKEND_STORE_URI names {url.get_backend_name()}; a server for several users "
            "needs postgresql://."
        )
    return url


def make_schema(url: URL) -> None:
    """Create the schema of users and permissions if it is missing.

    Raises:
        ServerError: the database cannot be reached, or the user may not create a schema.
    """
    engine = sqlalchemy.create_engine(url, connect_args={"connect_timeout": 10})
    try:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.schema.CreateSchema(AUTH_SCHEMA, if_not_exists=True))
    except SQLAlchemyError as error:
        # only the first line: the others repeat the statement
        reason = str(error).splitlines()[0]
        raise ServerError(f"The database {url.render_as_string()}: {reason}") from None
    finally:
        engine.dispose()


def auth_settings(url: URL) -> str:
    """Return the configuration of MLflow's `basic-auth` application, for the same database."""
    options = url.query.get("options", "")
    given = options if isinstance(options, str) else " ".join(options)
    auth_url = url.update_query_dict({"options": f"{given} -csearch_path={AUTH_SCHEMA}".strip()})
    uri = auth_url.render_as_string(hide_password=False)
    settings = {
        "database_uri": uri.replace("%", "%%"),  # MLflow lets configparser interpolate
        # A team shares its experiments: all users log to them, only the creator deletes one.
        "default_permission": "EDIT",
        # Without a cache, each request would hash a password several times, which is slow by
        # design. After a change, the old password stays valid for this long.
        "auth_cache_ttl_seconds": "60",
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    parser = configparser.RawConfigParser()
    parser["mlflow"] = settings
    text = io.StringIO()
    parser.write(text)
    return text.getvalue()


def write_private(path: Path, text: str) -> None:
    """Write a new file that only this user can read, from its first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def serve(environment: Mapping[str, str]) -> int:
    """Run the server until it or this process ends, and return its exit status.

    Raises:
        ServerError: the server cannot start.
    """
    url = check(environment)
    make_schema(url)
    with tempfile.TemporaryDirectory(prefix="mlflow-auth-") as folder:
        settings = Path(folder) / "basic_auth.ini"
        write_private(settings, auth_settings(url))
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"],
            env={**DEFAULTS, **environment, "MLFLOW_AUTH_CONFIG_PATH": str(settings)},
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.terminate())
        return server.wait()


if __name__ == "__main__":
    try:
        sys.exit(serve(os.environ))
    except ServerError as error:
        sys.exit(f"error: {error}")
