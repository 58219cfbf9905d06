"""Whether runs can be written to MLflow, by the driver and by the nodes."""

import os
import re
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlparse
from uuid import uuid4

import ray
import sqlalchemy
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from pipelines.core.tracking import Run, open_store, tracking_uri
from pipelines.diagnostics.finding import Finding, fail, note, ok
from pipelines.diagnostics.nodes import Answer, Node, ask
from pipelines.diagnostics.reasons import reason, without_password
from pipelines.diagnostics.scratch import scratch
from re2tal.errors import UserError

CHECK = "mlflow"
_FOLDER = "doctor"
_DRIVER = "driver"
_SQLITE = "sqlite:///"
# MLflow's client would ask a server that is not there for minutes
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
# an ImportError is of the module with which SQLAlchemy reaches a data base
_ERRORS = (MlflowException, UserError, SQLAlchemyError, ImportError, OSError)


def write(run: Run, who: str) -> None:
    """Writes a metric and an artifact; on a node or in the driver.

    Args:
        run: the run.
        who: writes.

    Raises:
        FileNotFoundError: if the store is a file, and not on this machine: it would be made.
        MlflowException: if the store refuses.
    """
    os.environ.update(_IMPATIENT)
    if run.uri.startswith(_SQLITE) and not Path(_file(run.uri)).is_file():
        raise FileNotFoundError(
            f"{_file(run.uri)} is not on this machine: set MLFLOW_TRACKING_URI to a server, or "
            "give --output a folder that all machines share"
        )
    now = int(time.time() * 1000)
    run.client.log_batch(run.run_id, metrics=[Metric(f"{_FOLDER}/{who}", 1.0, now, 0)])
    run.client.log_text(run.run_id, who, f"{_FOLDER}/{who}.txt")


def write_from_node(run: Run) -> None:
    """On a node: writes under the node's id.

    Args:
        run: the run.
    """
    write(run, str(ray.get_runtime_context().get_node_id()))


def check_tracking(output: str, nodes: Sequence[Node], *, seconds: float) -> list[Finding]:
    """Has the driver and every node write to a run that is deleted afterwards.

    A default store is not made by this: without one, a store in a folder beside it is tried.

    Args:
        output: absolute path or URI.
        nodes: of the cluster.
        seconds: to wait for them.
    """
    os.environ.update(_IMPATIENT)
    server = os.environ.get("MLFLOW_TRACKING_URI")
    name = _shown(server) if server else f"The default store in {output}"
    try:
        if server and server.startswith(_SQLITE) and not Path(_file(server)).is_file():
            return [note(CHECK, f"{name} is a file that is not there yet, and was not tried.")]
        if server and not server.startswith(_SQLITE):
            return _try(name, tempfile.gettempdir(), nodes, seconds)  # a server needs no folder
        if "://" in output or (not server and (Path(output) / "mlflow.db").is_file()):
            return _try(name, output, nodes, seconds)
        with scratch(output) as folder:
            return _try(name, folder, nodes, seconds)
    except UserError as error:
        return [fail(CHECK, str(error))]
    except _ERRORS as error:
        return [fail(CHECK, _refused("the driver", name, reason(error)))]


def _file(uri: str) -> str:
    return uri.removeprefix(_SQLITE)


def _try(name: str, output: str, nodes: Sequence[Node], seconds: float) -> list[Finding]:
    _open_database(tracking_uri(output))
    title = f"re2tal-doctor-{uuid4().hex}"
    client, uri, experiment = open_store(title, output=output)
    run = None
    try:
        run = Run(uri=uri, run_id=client.create_run(experiment).info.run_id)
        findings = _write_all(name, run, nodes, seconds)
    except _ERRORS as error:
        findings = [fail(CHECK, _refused("the driver", name, reason(error)))]
    try:
        _clean_up(client, run, experiment)
    except _ERRORS as error:
        text = f"{name}: the experiment {title}, made for this check, could not be deleted"
        findings.append(note(CHECK, f"{text} ({reason(error)}). Delete it by hand."))
    return findings


def _open_database(uri: str) -> None:
    """Raises at once what MLflow would try again and again for minutes."""
    if uri.partition(":")[0].partition("+")[0] in DATABASE_ENGINES:
        engine = sqlalchemy.create_engine(uri)
        sqlalchemy.inspect(engine)  # connects
        engine.dispose()


def _write_all(name: str, run: Run, nodes: Sequence[Node], seconds: float) -> list[Finding]:
    write(run, _DRIVER)
    answers = ask(nodes, write_from_node, run, seconds=seconds)
    stored = _stored(run, [_DRIVER, *(node.id for node in nodes)])
    lost = [one.node for one in answers if not one.error and one.node.id not in stored]
    ask(lost, delete_artifacts, _artifacts(run), seconds=seconds)
    if _DRIVER not in stored:
        text = f"{name} does not give back the metric and the artifact that the driver wrote. "
        return [fail(CHECK, f"{text}Look into the server's log.")]
    return judge(name, answers, lost) or _well(name, run.uri, nodes)


def _clean_up(client: MlflowClient, run: Run | None, experiment: str) -> None:
    if run is not None:
        delete_artifacts(_artifacts(run))
        client.delete_run(run.run_id)
    client.delete_experiment(experiment)
    _forget(client, None if run is None else run.run_id, experiment)


def _forget(client: MlflowClient, run_id: str | None, experiment: str) -> None:
    """Deletes what a data base only marks as deleted; a server does so when its owner says.

    `mlflow gc` does not do: it takes every deleted model along, whosever it is.
    """
    store = client._tracking_client.store
    if run_id is not None and hasattr(store, "_hard_delete_run"):
        store._hard_delete_run(run_id)
    if hasattr(store, "_hard_delete_experiment"):
        store._hard_delete_experiment(experiment)


def _artifacts(run: Run) -> str:
    return str(run.client.get_run(run.run_id).info.artifact_uri)


def delete_artifacts(uri: str) -> None:
    """Deletes the artifacts of a run, and the folders that become empty.

    Args:
        uri: where they are.
    """
    get_artifact_repository(uri).delete_artifacts()
    if uri.startswith("file:"):
        folder = Path(unquote(urlparse(uri).path))
        with suppress(OSError):  # there is something else in it
            folder.parent.rmdir()
            folder.parent.parent.rmdir()


def _stored(run: Run, names: Sequence[str]) -> set[str]:
    """Who finds the metric and the artifact that it wrote in the store."""
    metrics = run.client.get_run(run.run_id).data.metrics
    files = {Path(file.path).stem for file in run.client.list_artifacts(run.run_id, _FOLDER)}
    return {name for name in names if f"{_FOLDER}/{name}" in metrics and name in files}


def judge(name: str, answers: Sequence[Answer[None]], lost: Sequence[Node]) -> list[Finding]:
    """Tells what is wrong.

    Args:
        name: of the store, for people.
        answers: of the nodes that were to write.
        lost: nodes that wrote something which is not in the store.

    Returns:
        Failures; none if all is well.
    """
    findings = [
        fail(CHECK, _refused(answer.node.name, name, answer.error))
        for answer in answers
        if answer.error
    ]
    for node in lost:
        text = (
            f"{name}: what {node.name} writes does not arrive, because its artifacts go to a "
            "folder of its own. Start the server with --serve-artifacts, or with a "
            "--default-artifact-root in an object store."
        )
        findings.append(fail(CHECK, text))
    return findings


def advice(error: str) -> str:
    """Says what to do about an error of MLflow.

    Args:
        error: what it says.
    """
    low = error.lower()
    if "error code 401" in low or "unauthenticated" in low:
        return (
            "the server refuses the credentials. Set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, where the driver runs and on "
            f"every node ({error})."
        )
    if "error code 403" in low or "permission_denied" in low:
        return (
            "the server forbids it: this user may not write, or the server does not know the name "
            f"by which it is called (mlflow server --allowed-hosts) ({error})."
        )
    if "max retries exceeded" in low or "failed with exception" in low:
        cause = re.search(r"\[Errno[^\"')]*", error)  # the rest tells of requests and retries
        why = cause[0] if cause else error
        return f"no server answers there ({why}). Start it, or correct MLFLOW_TRACKING_URI."
    if "no module named" in low:
        return (
            "what reaches such a data base is not installed. Install it where the driver runs and "
            f"on every node, such as psycopg[binary] for PostgreSQL ({error})."
        )
    if "password authentication failed" in low or "access denied" in low:
        return f"the data base refuses user or password of MLFLOW_TRACKING_URI ({error})."
    if "out-of-date database schema" in low:
        return f"another version of MLflow made the data base: mlflow db upgrade URI ({error})."
    return f"{error}."


def _refused(who: str, name: str, error: str) -> str:
    return f"{name}: {who} cannot write there: {advice(error)}"


def _well(name: str, uri: str, nodes: Sequence[Node]) -> list[Finding]:
    who = {0: "the driver", 1: "the driver and the node"}.get(
        len(nodes), f"the driver and all {len(nodes)} nodes"
    )
    findings = [ok(CHECK, f"{name}: {who} can write a metric and an artifact.")]
    if uri.startswith(_SQLITE) and len(nodes) > 1:
        text = (
            f"{name} is one SQLite file that {len(nodes)} machines write to, which not every "
            "network file system bears. Prefer a server: MLFLOW_TRACKING_URI."
        )
        findings.append(note(CHECK, text))
    return findings


def _shown(uri: str) -> str:
    return without_password(uri)
