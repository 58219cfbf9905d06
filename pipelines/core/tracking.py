"""MLflow tracking: one run for each training run, written in batches without blocking a step.

The driver opens the store and creates the run, because several processes that open a new database
at once corrupt it. Rank 0 only appends metrics, through its own client.

MLflow is imported in the functions that need it: its import takes longer than all else of `--help`.
"""

import dataclasses
import getpass
import hashlib
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import TypeAdapter, ValidationError

from pipelines.config.recipe import WITHOUT_BACKBONE, Recipe
from pipelines.core import underway
from pipelines.core.checkout import git_commit, this_command
from pipelines.core.storage import database_file, database_url, fetch
from re2tal.errors import UserError, shortened
from re2tal.json_files import problem_of

if TYPE_CHECKING:
    from mlflow.entities import RunTag
    from mlflow.tracking import MlflowClient


_MAX_PARAMS = 100  # MLflow's limit per request
_ENDINGS = ("FINISHED", "FAILED", "KILLED")
_mine: dict[str, "Run"] = {}  # active runs of this process, by id
DIGEST = 36
"""Number of characters that MLflow keeps of a data set's digest."""
DRIVER = "re2tal.driver"
"""Tag of a run with the process that works on it."""


class Tracked(Protocol):
    """Configuration of an MLflow run."""

    @property
    def name(self) -> str:
        """Start of the run's name; the time follows."""

    @property
    def experiment(self) -> str:
        """MLflow experiment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Tracking URI and id of an MLflow run: plain strings, which can be sent to any process."""

    uri: str
    run_id: str

    @property
    def client(self) -> "MlflowClient":
        """Client of the run's store."""
        from mlflow.tracking import MlflowClient

        return MlflowClient(self.uri)


def tracking_uri(output: str | Path) -> str:
    """Return the store's URI: the server in `MLFLOW_TRACKING_URI`, else a SQLite file in `output`.

    Args:
        output: folder of the default store, absolute.

    Raises:
        UserError: there is no server, and `output` is the URI of an object store, which cannot hold
            a database.
    """
    if server := os.environ.get("MLFLOW_TRACKING_URI"):
        return server
    if "://" in str(output):
        raise UserError(
            f"{output} can hold checkpoints, but not MLflow's database: name a tracking server in "
            "the environment variable MLFLOW_TRACKING_URI, or a local folder."
        )
    return database_url(f"{output}/mlflow.db")


# Without this tag the UI shows an experiment as one of language models: traces instead of runs.
_KIND = {"mlflow.experimentKind": "custom_model_development"}


def _experiment_id(client: "MlflowClient", uri: str, name: str, output: str | Path) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        for key, value in _KIND.items():
            if key not in found.tags:
                client.set_experiment_tag(found.experiment_id, key, value)
        return found.experiment_id
    local = database_file(uri) is not None and "://" not in str(output)
    folder = (Path(output) / "artifacts").as_uri() if local else None
    return client.create_experiment(name, artifact_location=folder, tags=_KIND)


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested dataclass by dotted name: `("optim.clip", 1.0)`."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        name = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            if type(value) is not item.type:  # one of several classes, as of backbones: name it
                yield name, type(value).__name__
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def _tags(config: Tracked) -> "list[RunTag]":
    """Return the tags of every run: name, versions, user, command and commit."""
    from mlflow.entities import RunTag, SourceType
    from mlflow.utils import mlflow_tags

    packages = ("torch", "torchvision", "ray", "mlflow", "av")
    tags = {mlflow_tags.MLFLOW_RUN_NAME: f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"}
    tags |= {f"version.{name}": version(name) for name in packages}
    tags["version.python"] = platform.python_version()
    job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # as `ray job submit` sets it
    tags[mlflow_tags.MLFLOW_SOURCE_TYPE] = SourceType.to_string(
        SourceType.JOB if job else SourceType.LOCAL
    )
    tags[mlflow_tags.MLFLOW_SOURCE_NAME] = sys.argv[0]
    tags[mlflow_tags.MLFLOW_USER] = os.environ.get("MLFLOW_TRACKING_USERNAME") or _user()
    note = f"Command, in the folder `{Path.cwd()}`"
    commit = git_commit(Path(__file__).parent)
    if commit is not None:
        tags[mlflow_tags.MLFLOW_GIT_COMMIT] = commit
        note += f" at commit {commit[:12]}{'-dirty' * commit.endswith('-dirty')}"
    tags[mlflow_tags.MLFLOW_RUN_NOTE] = f"{note}:\n\n    {this_command()}\n"
    return [RunTag(key, value) for key, value in tags.items()]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())


def _parameters(config: Tracked) -> dict[str, str]:
    """Return the leaves of a configuration, without those that a run on features does not use."""
    found = {name: str(value) for name, value in flatten(config)}
    if found.get("data.features", "None") != "None":
        for name in list(found):
            if name.startswith(_OF_FRAMES) and name not in _OF_TIME:
                del found[name]
    return found


_OF_FRAMES = (
    "data.videos",
    "finetune.",
    "data.make_toy",
    "data.size",
    "data.augmentation",
    "model.mean",
    "model.std",
    "model.adapters",
    "model.lora",
    *(f"model.{name}" for name in WITHOUT_BACKBONE),
    "optim.backbone_lr",
    "optim.layer_decay",
)
_OF_TIME = ("data.augmentation.speed", "data.augmentation.reverse")


def open_store(experiment: str, *, output: str | Path) -> "tuple[MlflowClient, str, str]":
    """Open the store; create it and the experiment if they are missing.

    Args:
        experiment: name of the experiment.
        output: folder of the default store; may be a URI only if a server is set.

    Returns:
        A client, the tracking URI and the experiment's id.

    Raises:
        MlflowException: the store cannot be reached.
        UserError: see `tracking_uri`.
    """
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):  # these log each table of a new store
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(output)
    file = database_file(uri)
    # the output's lock first, the order of all callers that find or create runs: no deadlock
    with underway.alone(output):
        with underway.alone(output if file is None else file.parent):
            client = MlflowClient(uri)  # creates the tables
            experiment_id = _experiment_id(client, uri, experiment, output)
        _settle(client, output)
    return client, uri, experiment_id


def _settle(client: "MlflowClient", output: str | Path) -> None:
    """End the runs whose process is gone in MLflow: with their noted ending, or as KILLED."""
    from mlflow.exceptions import MlflowException

    for run_id, ending in underway.left_behind(output).items():
        try:
            run = Run(uri=client.tracking_uri, run_id=run_id)
            known = ending.get("status") in _ENDINGS
            if known or client.get_run(run_id).info.status == "RUNNING":
                _tell_end(run, ending["status"] if known else "KILLED", ending.get("error"))
        except MlflowException:  # the run is in another store
            continue
        underway.forget(output, run_id)


def create_run(
    client: "MlflowClient",
    experiment: str,
    *,
    output: str | Path,
    tags: Mapping[str, str],
    work: str = "",
) -> Run:
    """Create a run that this process works on.

    Args:
        client: client of the store.
        experiment: the experiment's id.
        output: folder of the default store, which receives a note that the run is active.
        tags: tags of the run, in addition to the one that names this process.
        work: fingerprint of the run's configuration.
    """
    made = client.create_run(experiment, tags={**tags, DRIVER: underway.this_process()})
    run = Run(uri=client.tracking_uri, run_id=made.info.run_id)
    _begin(run, output, work)
    return run


def _begin(run: Run, output: str | Path, work: str = "") -> None:
    underway.begin(output, run.run_id, work=work)
    _mine[run.run_id] = run


def take_up(run: Run, *, output: str | Path) -> None:
    """Reopen a run that has ended, or whose process is gone, for this process to continue."""
    client = run.client
    client.update_run(run.run_id, status="RUNNING")
    client.set_tag(run.run_id, DRIVER, underway.this_process())
    if "error" in client.get_run(run.run_id).data.tags:
        client.delete_tag(run.run_id, "error")
    _begin(run, output)


def start_run(
    recipe: Tracked,
    *,
    output: str | Path,
    tags: Mapping[str, str] | None = None,
    once: bool = False,
) -> Run:
    """Open the store, and start a run with the whole configuration.

    Args:
        recipe: the configuration, a dataclass.
        output: folder of the default store; made if it is missing.
        tags: tags of this run, in addition to those that every run has.
        once: raise if another process works on the same configuration, because both would write the
            same files.

    Raises:
        MlflowException: the store cannot be reached.
        UserError: see `once`.
    """
    from mlflow.entities import Param, RunTag

    params = [Param(name, value) for name, value in _parameters(recipe).items()]
    work = hashlib.sha256(repr([type(recipe).__name__, *params]).encode()).hexdigest()
    with underway.alone(output):
        client, uri, experiment = open_store(recipe.experiment, output=output)
        if once and (other := underway.worker_on(output, work)):
            raise UserError(
                f"The same work is under way in {underway.described(other[1])}: MLflow run "
                f"{other[0]} in {uri}. Wait for it or end it."
            )
        run = create_run(client, experiment, output=output, tags=tags or {}, work=work)
    for start in range(0, len(params), _MAX_PARAMS):
        client.log_batch(run.run_id, params=params[start : start + _MAX_PARAMS])
    extra = [RunTag(k, v) for k, v in (_origin(client, tags or {}) | dict(tags or {})).items()]
    client.log_batch(run.run_id, tags=[*_tags(recipe), *extra])
    return run


def _origin(client: "MlflowClient", tags: Mapping[str, str]) -> dict[str, str]:
    """Return the command and the source of a run's parent: a sweep's trial runs in a Ray worker."""
    from mlflow.utils import mlflow_tags

    parent = tags.get(mlflow_tags.MLFLOW_PARENT_RUN_ID)
    known = {} if parent is None else client.get_run(parent).data.tags
    shared = (
        mlflow_tags.MLFLOW_RUN_NOTE,
        mlflow_tags.MLFLOW_SOURCE_NAME,
        mlflow_tags.MLFLOW_SOURCE_TYPE,
        mlflow_tags.MLFLOW_GIT_COMMIT,
    )
    return {name: known[name] for name in shared if name in known}


def log_dataset(run: Run, *, source: str, digest: str, subsets: Mapping[str, str]) -> None:
    """Record the data of a run: its subsets, and the file and fingerprint of the annotations.

    Args:
        run: the run.
        source: path or URI of the annotations.
        digest: fingerprint of the annotations.
        subsets: use, such as "training" or "validation", to the name of the data used for it.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    inputs = [
        DatasetInput(
            Dataset(
                name=name,
                digest=digest[:DIGEST],
                source_type="http" if "://" in source else "local",
                source=json.dumps({"uri": source}),
            ),
            [InputTag(key=MLFLOW_DATASET_CONTEXT, value=use)],
        )
        for use, name in subsets.items()
    ]
    run.client.log_inputs(run.run_id, inputs)
    run.client.set_tag(run.run_id, "data.fingerprint", digest)


def log_text(run: Run, lines: Sequence[str], name: str) -> None:
    """Write lines to the artifact `name` of a run; without lines there is no artifact."""
    if lines:
        run.client.log_text(run.run_id, "\n".join(lines) + "\n", name)


@contextmanager
def finishing(run: Run) -> Iterator[None]:
    """End a run with its block: as FINISHED, KILLED (interrupted) or FAILED with the error's text.

    The block's own error is raised. If MLflow cannot record the ending, the error gets a note, and
    the next command with the same output records it.
    """
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[:5000]
        if problem := end_run(run, "FAILED", error=text):
            error.add_note(problem)
        raise
    except BaseException as stop:  # an interruption, not an error
        if problem := end_run(run, "KILLED"):
            stop.add_note(problem)
        raise
    if problem := end_run(run, "FINISHED"):
        print(f"warning: {problem}", file=sys.stderr, flush=True)


def end_run(run: Run, status: str, *, error: str | None = None) -> str:
    """End a run of this process.

    Args:
        run: the run.
        status: FINISHED, FAILED or KILLED.
        error: text of the error that ended it.

    Returns:
        A sentence about the problem if MLflow could not record the ending, else an empty string.
    """
    _mine.pop(run.run_id, None)
    with _impatient():
        try:
            _tell_end(run, status, error)
        except Exception as problem:  # any problem here must not hide the run's own error
            noted = underway.leave(run.run_id, status=status, error=error)
            later = "The next command with the same output records it." if noted else ""
            reason = next(iter(str(problem).splitlines()), type(problem).__name__)[:300]
            return f"MLflow could not record that the run is {status} ({reason}). {later}".strip()
    underway.end(run.run_id)
    return ""


def end_all(status: str, *, error: str) -> list[str]:
    """End all runs of this process, which is about to end; return the sentences of `end_run`."""
    told = [end_run(run, status, error=error) for run in [*_mine.values()]]
    return [problem for problem in told if problem]


def _tell_end(run: Run, status: str, error: str | None) -> None:
    if error is not None:
        run.client.set_tag(run.run_id, "error", error)
    run.client.set_terminated(run.run_id, status)


@contextmanager
def _impatient() -> Iterator[None]:
    """Limit MLflow's client to one retry, not minutes of them, unless the user set a limit."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


FILE = "recipe.json"
_RECIPE = TypeAdapter(Recipe)


def log_recipe(run: Run, recipe: Recipe) -> None:
    """Write a run's configuration to its artifacts."""
    run.client.log_text(run.run_id, _RECIPE.dump_json(recipe, indent=2).decode(), FILE)


# Fields that only earlier versions wrote into recipes, and that changed no result.
_DROPPED = {"optim.compile"}


def recipe_of(run: Run) -> Recipe:
    """Read the configuration of a run of `train.py`, or of a trial of a sweep.

    Raises:
        UserError: there is no such run, another script made it, or its configuration has fields
            that this version does not know.
    """
    with tempfile.TemporaryDirectory() as folder:
        uri = f"runs:/{run.run_id}/{FILE}"
        path = fetch(uri, Path(folder), tracking_uri=run.uri, what="The run's configuration")
        content = path.read_bytes()
    try:
        recipe = _RECIPE.validate_json(content)
    except ValidationError as error:
        listed = "; ".join(shortened([*map(problem_of, error.errors())], 5))
        raise UserError(f"{uri} is not a recipe of this version of re2tal: {listed}") from error
    known = _names(json.loads(_RECIPE.dump_json(recipe))) | _DROPPED
    unknown = _names(json.loads(content)) - known
    if unknown:
        raise UserError(
            f"{uri} is not a recipe of this version of re2tal, which has no "
            f"{', '.join(sorted(unknown))}: train with the version that made it."
        )
    return recipe


def _names(value: Any, prefix: str = "") -> set[str]:
    """Return the dotted names of all fields in nested objects."""
    if not isinstance(value, dict):
        return {prefix}
    return {
        name
        for key, inner in value.items()
        for name in _names(inner, f"{prefix}.{key}" if prefix else key)
    }
