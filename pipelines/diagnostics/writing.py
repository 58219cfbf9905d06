"""Checks of the places that runs write to, output and MLflow, from the driver and every node."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from uuid import uuid4

import pyarrow.fs as pafs
import sqlalchemy
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from sqlalchemy.exc import SQLAlchemyError

from pipelines.core.metric_log import log_metrics
from pipelines.core.storage import database_file, join, read_bytes, replacing, resolve
from pipelines.core.tracking import Run, create_run, finishing, log_text, open_store, tracking_uri
from pipelines.diagnostics.findings import Finding, fail, note, ok, reason, without_password
from pipelines.diagnostics.nodes import DRIVER, Cluster, Node
from re2tal.errors import UserError


@contextmanager
def scratch(output: str) -> Iterator[str]:
    """Make a folder in the output; remove it at the end, and the output if it did not exist."""
    filesystem, path = resolve(output)
    chain = takewhile(lambda one: one not in ("", "."), [path, *map(str, Path(path).parents)])
    missing = list(takewhile(lambda one: not _exists(filesystem, one), chain))
    name = f".doctor-{uuid4().hex}"
    try:
        filesystem.create_dir(f"{path}/{name}", recursive=True)
        yield join(output, name)
    finally:
        if _exists(filesystem, f"{path}/{name}"):
            filesystem.delete_dir(f"{path}/{name}")
        for folder in missing:
            _remove_empty(filesystem, folder)


def _exists(filesystem: pafs.FileSystem, folder: str) -> bool:
    return bool(filesystem.get_file_info(folder).type != pafs.FileType.NotFound)


def _remove_empty(filesystem: pafs.FileSystem, folder: str) -> None:
    """Remove a folder unless another process has put something into it meanwhile."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        with suppress(OSError):
            Path(folder).rmdir()
    elif _exists(filesystem, folder) and not filesystem.get_file_info(pafs.FileSelector(folder)):
        filesystem.delete_dir(folder)


def _content(node: Node) -> bytes:
    return f"written by {node.id}".encode()


def _sees(folder: str, node: Node) -> bool:
    """Tell whether a node's file is in a folder."""
    try:
        return read_bytes(join(folder, node.id)) == _content(node)
    except FileNotFoundError:
        return False


def exchange(node: Node, folder: str) -> bool:
    """Write a file named after the node; if the driver's is missing, only return False."""
    if node != DRIVER and not _sees(folder, DRIVER):
        return False
    with replacing(join(folder, node.id)) as stream:
        stream.write(_content(node))
    return True


def check_output(output: str, cluster: Cluster) -> list[Finding]:
    """Check that the driver and all nodes can write the output, and see each other's files."""
    if "://" in output:
        advice = (
            "Correct --output, or set the credentials of the object store in the environment of "
            "the driver and of every node."
        )
        apart = "they reach different stores. Compare endpoint and credentials of the two."
    else:
        advice = "Give --output a writable folder."
        apart = (
            "it is not shared by the machines. Give --output a folder that all of them mount, or "
            "the URI of an object store (s3://...)."
        )

    def refused(node: Node, why: str) -> Finding:
        return fail(f"{node.name} cannot read and write {output} ({why}). {advice}")

    try:
        with scratch(output) as folder:
            answers = cluster.ask_after_driver(exchange, folder)
            unseen = [one.node for one in answers if one.value and not _sees(folder, one.node)]
    except (OSError, ValueError) as error:
        return [refused(DRIVER, reason(error))]
    findings = [refused(answer.node, answer.error) for answer in answers if answer.error]
    findings += [
        fail(f"{answer.node.name} does not see what the driver wrote to {output}: {apart}")
        for answer in answers
        if answer.value is False
    ]
    findings += [
        fail(f"The driver does not see what {whose} wrote to {output}: {apart}")
        for whose in ("it" if node == DRIVER else node.name for node in unseen)
    ]
    others = ", which see each other's files" if cluster.nodes else ""
    return findings or [ok(f"{output} can be written by {cluster.everyone}{others}.")]


EXPERIMENT = "re2tal-doctor"
TAG = "re2tal.doctor"
_FOLDER = "doctor"
# by default MLflow's client retries an absent server for minutes
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
# ImportError: SQLAlchemy's driver for the database is missing
_ERRORS = (MlflowException, SQLAlchemyError, ImportError, OSError)


def write(node: Node, run: Run) -> None:
    """Write a metric and an artifact named after the node.

    Raises:
        FileNotFoundError: if the store is a file that is not on this machine; MLflow would create
            it.
    """
    os.environ.update(_IMPATIENT)
    file = database_file(run.uri)
    if file is not None and not file.is_file():
        raise FileNotFoundError(
            f"{file} is not on this machine: set MLFLOW_TRACKING_URI to a server, or give --output "
            "a folder that all machines share"
        )
    log_metrics(run, {f"{_FOLDER}/{node.id}": 1.0}, step=0)
    log_text(run, [node.id], f"{_FOLDER}/{node.id}.txt")


def check_mlflow(output: str, cluster: Cluster) -> list[Finding]:
    """Check that the driver and every node can write to an MLflow run.

    The run stays in the experiment `EXPERIMENT` with the tag `TAG`. A default store that does not
    exist yet is not created: a store in a temporary folder beside it is tried instead.
    """
    os.environ.update(_IMPATIENT)
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    name = without_password(server) if server else f"the default store in {output}"
    file = database_file(server)
    try:
        if file:
            if not file.is_file():
                return [note(f"{name} is a file that does not exist yet, and was not tried.")]
            return _try(name, str(file.parent), cluster)
        if server:
            with tempfile.TemporaryDirectory() as folder:  # a server does not need the output
                return _try(name, folder, cluster)
        if "://" in output or (Path(output) / "mlflow.db").is_file():
            return _try(name, output, cluster)
        with scratch(output) as folder:
            return _try(name, folder, cluster)
    except UserError as error:
        return [fail(str(error))]
    except _ERRORS as error:
        return [_refused(DRIVER, name, reason(error))]


def _try(name: str, output: str, cluster: Cluster) -> list[Finding]:
    _open_database(tracking_uri(output))
    client, uri, experiment = open_store(EXPERIMENT, output=output)
    if client.get_experiment(experiment).lifecycle_stage == "deleted":
        client.restore_experiment(experiment)
    run = create_run(client, experiment, output=output, tags={TAG: "true"})
    with finishing(run):
        answers = cluster.ask_after_driver(write, run)
        metrics = client.get_run(run.run_id).data.metrics
        files = {Path(file.path).stem for file in client.list_artifacts(run.run_id, _FOLDER)}
    findings = [_refused(one.node, name, one.error) for one in answers if one.error]
    for node in (answer.node for answer in answers if not answer.error):
        if f"{_FOLDER}/{node.id}" not in metrics or node.id not in files:
            text = f"{node.name} writes to MLflow at {name}, but not all of it arrives: artifacts "
            text += "go to a local folder. Start the server with --serve-artifacts, or with a "
            findings.append(fail(f"{text}--default-artifact-root in an object store."))
    if findings:
        return findings
    findings = [ok(f"A metric and an artifact can be written to {name} by {cluster.everyone}.")]
    if database_file(uri) and len(cluster.nodes) > 1:
        text = f"{len(cluster.nodes)} machines write to {name}, one SQLite file, which is not safe "
        text += "on every network file system. Prefer a server: MLFLOW_TRACKING_URI."
        findings.append(note(text))
    return findings


def _open_database(uri: str) -> None:
    """Raise at once any error that MLflow would retry for minutes."""
    if uri.partition(":")[0].partition("+")[0] in DATABASE_ENGINES:
        engine = sqlalchemy.create_engine(uri)
        sqlalchemy.inspect(engine)  # connects
        engine.dispose()


# advice by pattern of the error; the first match counts
_ADVICE = {
    "error code 401|unauthenticated": "the server refuses the credentials. Set "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, where the "
    "driver runs and on every node",
    "error code 403|permission_denied": "the server forbids it: this user may not write, or the "
    "server does not know the name by which it is called (mlflow server --allowed-hosts)",
    "max retries exceeded|failed with exception": "no server answers there. Start it, or correct "
    "MLFLOW_TRACKING_URI",
    "no module named": "the database's driver is not installed. Install it where the driver runs "
    "and on every node, such as psycopg[binary] for PostgreSQL",
    "password authentication failed|access denied": "the database refuses user or password of "
    "MLFLOW_TRACKING_URI",
    "out-of-date database schema": "another version of MLflow made the database: mlflow db "
    "upgrade URI",
}


def _refused(node: Node, name: str, error: str) -> Finding:
    told = [advice for words, advice in _ADVICE.items() if re.search(words, error.lower())]
    cause = re.search(r"\[Errno[^\"')]*", error)  # without its requests and retries
    why = f"{told[0]} ({cause[0] if cause else error})" if told else error
    return fail(f"{node.name} cannot write to MLflow at {name}: {why}.")
