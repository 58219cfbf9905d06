"""Resuming: a command that is given again goes on with the run that it did not finish.

MLflow says which run that is, so that other machines of a cluster see it too: each run is tagged
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
from pipelines.core.storage import join
from pipelines.core.tracking import Run, Tracked, flatten, open_store, start_run
from pipelines.data.clip_plan import AnyPlan
from pipelines.training.retention import newest_checkpoint
from re2tal.errors import UserError

_DIGEST = "re2tal.configuration"
_DRIVER = "re2tal.driver"


def digest(config: Tracked, plan: AnyPlan, **more: str) -> str:
    """Compute a hash of everything that the result of a run depends on, except the code.

    Args:
        config: dataclass with absolute paths; its field `resume` makes no difference.
        plan: classes and videos of the run.
        more: further facts that tell the run from others.
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
    """Continue the last run of this configuration if it has not ended, else start one.

    Args:
        recipe: recipe with absolute paths.
        plan: classes and videos of the run.
        parent: id of the run that it belongs to, such as a sweep's; only runs of that parent are
            continued.

    Returns:
        The run, and whether it was continued.

    Raises:
        UserError: if a process on this machine is working on it.
    """
    output = recipe.output
    of = {} if parent is None else {MLFLOW_PARENT_RUN_ID: parent}
    tags = of | mark(digest(recipe, plan, **of))
    run = last_run(recipe, tags, output=output) if recipe.resume else None
    status = run and run.client.get_run(run.run_id).info.status
    if run is None or status == "FINISHED":
        return start_run(recipe, output=output, tags=tags), False
    if newest_checkpoint(join(output, run.run_id)) is None:
        if status == "RUNNING":  # its driver was killed before it could end the run
            run.client.set_terminated(run.run_id, "KILLED")
        return start_run(recipe, output=output, tags=tags), False
    reopen(run)
    return run, True


def mark(configuration: str) -> dict[str, str]:
    """Return the tags by which a run is found again, for a configuration's `digest`."""
    return {_DIGEST: configuration, _DRIVER: _driver()}


def last_run(config: Tracked, tags: Mapping[str, str], *, output: str) -> Run | None:
    """Find the last run with the mark of a configuration, however it ended.

    Args:
        config: configuration that names the experiment.
        tags: tags that `mark` returned.
        output: folder of the default store.

    Raises:
        UserError: if a process on this machine is working on it.
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
    """Make this process the driver of a run that `last_run` returned."""
    client = run.client
    client.update_run(run.run_id, status="RUNNING")
    client.set_tag(run.run_id, _DRIVER, _driver())
    if "error" in client.get_run(run.run_id).data.tags:
        client.delete_tag(run.run_id, "error")


def _driver() -> str:
    process = psutil.Process()
    return f"{socket.gethostname()} {os.getpid()} {process.create_time():.2f}"


def _refuse_if_alive(driver: str, run: Run) -> None:
    host, _, process = driver.partition(" ")
    if host != socket.gethostname():
        return  # it runs on another machine, which this one cannot look into
    number, created = process.split()
    try:
        alive = f"{psutil.Process(int(number)).create_time():.2f}" == created
    except psutil.NoSuchProcess:
        return
    if alive and int(number) != os.getpid():
        raise UserError(
            f"This run is going on in process {number}: MLflow run {run.run_id} in {run.uri}. "
            "Wait for it or end it; for a second run beside it give --no-resume."
        )
