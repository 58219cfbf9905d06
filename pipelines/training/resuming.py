"""A command that is given again goes on with the run that it did not finish.

Which run that is stands in MLflow, where a cluster's other machines see it too: each run is tagged
with a digest of its configuration and data, and with the process that drives it.
"""

import hashlib
import json
import os
import socket
from collections.abc import Mapping

import psutil
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipelines.config.recipe import RunConfig
from pipelines.core.storage import join, read_bytes, remove, sizes_below
from pipelines.core.tracking import Run, Tracked, flatten, open_store, start_run
from pipelines.data.clip_plan import AnyPlan
from pipelines.training.checkpoints import is_complete
from re2tal.errors import UserError

_DIGEST = "re2tal.configuration"
_DRIVER = "re2tal.driver"
_SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of a run's checkpoints


def digest(config: Tracked, plan: AnyPlan, **more: str) -> str:
    """A hash of all that the result of a run depends on, but for the code.

    Args:
        config: a dataclass with absolute paths; whether it says `resume` makes no difference.
        plan: what it works on.
        more: what else tells it from others.
    """
    content = {
        "recipe": {name: str(value) for name, value in flatten(config) if name != "resume"},
        "annotations": plan.fingerprint,
        "videos": sorted(plan.uris.items()),
        **more,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def resume_or_start(
    recipe: RunConfig, plan: AnyPlan, *, parent: str | None = None
) -> tuple[Run, bool]:
    """Takes up the last run of this configuration if it has not ended, else starts one.

    Args:
        recipe: with absolute paths.
        plan: what it works on.
        parent: id of the run that it is part of, such as a sweep's; a run that is not part of it is
            another.

    Returns:
        The run, and whether it goes on.

    Raises:
        UserError: if a process on this machine is at it.
    """
    output = recipe.output
    of = {} if parent is None else {MLFLOW_PARENT_RUN_ID: parent}
    tags = of | mark(digest(recipe, plan, **of))
    run = last_run(recipe, tags, output=output) if recipe.resume else None
    status = run and run.client.get_run(run.run_id).info.status
    if run is None or status == "FINISHED":
        return start_run(recipe, output=output, tags=tags), False
    if newest_checkpoint(join(output, run.run_id)) is None:
        if status == "RUNNING":  # its driver was killed, and could not say so
            run.client.set_terminated(run.run_id, "KILLED")
        return start_run(recipe, output=output, tags=tags), False
    _drop_damaged_list(join(output, run.run_id))
    reopen(run)
    return run, True


def mark(configuration: str) -> dict[str, str]:
    """The tags by which a run is found again.

    Args:
        configuration: what `digest` returned.
    """
    return {_DIGEST: configuration, _DRIVER: _driver()}


def last_run(config: Tracked, tags: Mapping[str, str], *, output: str) -> Run | None:
    """The last run with the mark of a configuration, however it ended.

    Args:
        config: names the experiment.
        tags: what `mark` returned.
        output: folder of the default store.

    Raises:
        UserError: if a process on this machine is at it.
    """
    client, uri, experiment = open_store(config.experiment, output=output)
    found = client.search_runs(
        [experiment],
        filter_string=f"tags.`{_DIGEST}` = '{tags[_DIGEST]}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    if not found:
        return None
    run = Run(uri=uri, run_id=found[0].info.run_id)
    if found[0].info.status == "RUNNING":
        _refuse_if_alive(found[0].data.tags.get(_DRIVER, ""), run)
    return run


def reopen(run: Run) -> None:
    """Makes this process the one that goes on with a run.

    Args:
        run: what `last_run` returned.
    """
    client = run.client
    client.update_run(run.run_id, status="RUNNING")
    client.set_tag(run.run_id, _DRIVER, _driver())
    if "error" in client.get_run(run.run_id).data.tags:
        client.delete_tag(run.run_id, "error")


def newest_checkpoint(folder: str) -> str | None:
    """The newest whole checkpoint of a run, whatever Ray Train's list of them says.

    Args:
        folder: of the run, a path or URI.

    Returns:
        Its path or URI.
    """
    names = {name.partition("/")[0] for name in sizes_below(folder)}
    checkpoints = sorted((name for name in names if name.startswith("checkpoint_")), reverse=True)
    return next((uri for name in checkpoints if is_complete(uri := join(folder, name))), None)


def _drop_damaged_list(folder: str) -> None:
    """Removes Ray Train's list if a kill cut it short: it is not written in one go.

    Without it Ray Train begins a new one, and the run goes on from the newest whole checkpoint.
    """
    uri = join(folder, _SNAPSHOT)
    try:
        json.loads(read_bytes(uri))
    except FileNotFoundError:
        return
    except ValueError:
        remove(uri)


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
        raise UserError(
            f"This very run is going on in process {number}: MLflow run {run.run_id} in {run.uri}. "
            "Wait for it or end it; for a second run beside it give --no-resume."
        )
