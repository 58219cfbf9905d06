"""A command that is given again goes on with the run that it did not finish.

Which run that is stands in MLflow, where a cluster's other machines see it too: each run is tagged
with a digest of its configuration and data, and with the process that drives it.
"""

import hashlib
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import psutil
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient

from pipelines.checkpoints import is_complete
from pipelines.settings import RunConfig
from pipelines.task import AnyPlan
from pipelines.tracking import Run, flatten, open_store, start_run

_DIGEST = "re2tal.configuration"
_DRIVER = "re2tal.driver"
_SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of a run's checkpoints


class RunningError(Exception):
    """The same command is being run at this moment; the message says where."""


def digest(recipe: RunConfig, plan: AnyPlan) -> str:
    """A hash of all that the result of a run depends on, but for the code.

    Args:
        recipe: with absolute paths.
        plan: what it works on.
    """
    content = {
        "recipe": {name: str(value) for name, value in flatten(replace(recipe, resume=True))},
        "annotations": plan.fingerprint,
        "videos": sorted(plan.uris.items()),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def resume_or_start(recipe: RunConfig, plan: AnyPlan) -> tuple[Run, bool]:
    """Takes up the last run of this configuration if it has not ended, else starts one.

    Args:
        recipe: with absolute paths.
        plan: what it works on.

    Returns:
        The run, and whether it goes on.

    Raises:
        RunningError: if a process on this machine is at it.
    """
    output = Path(recipe.output)
    client, uri, experiment = open_store(recipe.experiment, output=output)
    tags = {_DIGEST: digest(recipe, plan), _DRIVER: _driver()}
    last = _last_run(client, experiment, tags[_DIGEST]) if recipe.resume else None
    if last is None or last.info.status == "FINISHED":
        return start_run(recipe, output=output, tags=tags), False
    run = Run(uri=uri, run_id=last.info.run_id)
    _refuse_if_alive(last.data.tags.get(_DRIVER, ""), run)
    if newest_checkpoint(output / run.run_id) is None:
        if last.info.status == "RUNNING":  # its driver was killed, and could not say so
            client.set_terminated(run.run_id, "KILLED")
        return start_run(recipe, output=output, tags=tags), False
    _drop_damaged_list(output / run.run_id)
    client.update_run(run.run_id, status="RUNNING")
    client.set_tag(run.run_id, _DRIVER, tags[_DRIVER])
    if "error" in last.data.tags:
        client.delete_tag(run.run_id, "error")
    return run, True


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, whatever Ray Train's list of them says.

    Args:
        folder: of the run.
    """
    whole = [path for path in folder.glob("checkpoint_*") if is_complete(path)]
    return max(whole, key=lambda path: path.name, default=None)


def _drop_damaged_list(folder: Path) -> None:
    """Removes Ray Train's list if a kill cut it short: it is not written in one go.

    Without it Ray Train begins a new one, and the run goes on from the newest whole checkpoint.
    """
    path = folder / _SNAPSHOT
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        path.unlink()


def _last_run(client: MlflowClient, experiment: str, wanted: str) -> MlflowRun | None:
    found = client.search_runs(
        [experiment],
        filter_string=f"tags.`{_DIGEST}` = '{wanted}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return found[0] if found else None


def _driver() -> str:
    process = psutil.Process()
    return f"{socket.gethostname()} {os.getpid()} {process.create_time():.2f}"


def _refuse_if_alive(driver: str, run: Run) -> None:
    host, _, process = driver.partition(" ")
    if host != socket.gethostname():
        return  # whether it lives cannot be seen from here
    number, created = process.split()
    try:
        alive = f"{psutil.Process(int(number)).create_time():.2f}" == created
    except psutil.NoSuchProcess:
        return
    if alive and int(number) != os.getpid():
        raise RunningError(
            f"This very run is going on in process {number}: MLflow run {run.run_id} in {run.uri}. "
            "Wait for it or end it; for a second run beside it give --no-resume."
        )
