"""Resuming: a repeated command goes on with the run that it did not finish.

The run is found in MLflow, so other machines of a cluster find it too: each run is tagged with a
digest of its configuration and data.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipelines.config.recipe import RunConfig
from pipelines.core.storage import join
from pipelines.core.tracking import (
    DRIVER,
    Run,
    Tracked,
    flatten,
    open_store,
    start_run,
    take_up,
)
from pipelines.core.underway import alone, described, is_alive, is_under_way, this_process
from pipelines.data.clip_plan import AnyPlan
from pipelines.training.layouts import Layout
from pipelines.training.retention import newest_checkpoint
from re2tal.errors import UserError

_DIGEST = "re2tal.configuration"
ASKED = "re2tal.fit"
"""Tag of a run whose step was laid out for a size of memory: `asked_to_fit` of its command."""
_LAYOUT = "re2tal.layout"
_NO_DIFFERENCE = frozenset({"resume", "scale.validation_workers"})
# Number of a run among those of its configuration; start times would mislead if a clock is set back
_NUMBER = "re2tal.number"


def digest(config: Tracked, plan: AnyPlan, **more: str) -> str:
    """Compute a hash of everything that the result of a run depends on, except the code.

    Args:
        config: dataclass with absolute paths; some fields change no result (`_NO_DIFFERENCE`).
        plan: classes and videos of the run.
        more: further facts that distinguish the run from others.
    """
    content = {
        "recipe": {n: str(value) for n, value in flatten(config) if n not in _NO_DIFFERENCE},
        "annotations": plan.fingerprint,
        "videos": sorted(plan.uris.items()),
        **more,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def resume_or_start(
    recipe: RunConfig,
    plan: AnyPlan,
    *,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> tuple[Run, bool]:
    """Continue the last run of this configuration if it has not ended, else start one.

    Args:
        recipe: recipe with absolute paths.
        plan: classes and videos of the run.
        parent: id of the parent run, such as a sweep's; only runs of that parent are continued.
        tags: further tags of a run that is started, set when it is created.

    Returns:
        The run, and whether it was continued.

    Raises:
        UserError: if another process is working on it.
    """
    with alone(recipe.output):  # of two equal commands, the second sees the first one's run
        return _resume_or_start(recipe, plan, parent=parent, more=tags or {})


def _resume_or_start(
    recipe: RunConfig, plan: AnyPlan, *, parent: str | None, more: Mapping[str, str]
) -> tuple[Run, bool]:
    output = recipe.output
    of = {} if parent is None else {MLFLOW_PARENT_RUN_ID: parent}
    tags = {**of, **more} | mark(recipe, digest(recipe, plan, **of), output=output)
    run = last_run(recipe, tags, output=output) if recipe.resume else None
    status = run and run.client.get_run(run.run_id).info.status
    if run is None or status == "FINISHED":
        return start_run(recipe, output=output, tags=tags), False
    if newest_checkpoint(join(output, run.run_id)) is None:
        if status == "RUNNING":  # its driver was killed before it could end the run
            run.client.set_terminated(run.run_id, "KILLED")
        return start_run(recipe, output=output, tags=tags), False
    take_up(run, output=output)
    return run, True


def mark(config: Tracked, configuration: str, *, output: str) -> dict[str, str]:
    """Return the tags by which a run is found again.

    Args:
        config: configuration that names the experiment.
        configuration: its `digest`.
        output: folder of the default store.
    """
    _, found = _latest(config, _DIGEST, configuration, output=output)
    number = int(found[0].data.tags.get(_NUMBER, 0)) + 1 if found else 1
    return {_DIGEST: configuration, _NUMBER: f"{number:06}"}


def last_run(config: Tracked, tags: Mapping[str, str], *, output: str) -> Run | None:
    """Find the last run with the mark of a configuration, however it ended.

    Args:
        config: configuration that names the experiment.
        tags: tags that `mark` returned.
        output: folder of the default store.

    Raises:
        UserError: if another process is working on it.
    """
    uri, found = _latest(config, _DIGEST, tags[_DIGEST], output=output)
    if not found:
        return None
    run = Run(uri=uri, run_id=found[0].info.run_id)
    driver = found[0].data.tags.get(DRIVER, "")
    other = driver != this_process()
    if is_under_way(output, run.run_id) or (
        found[0].info.status == "RUNNING" and other and is_alive(driver)
    ):
        raise UserError(
            f"This run is under way in {described(driver)}: MLflow run {run.run_id} in {run.uri}. "
            "Wait for it or end it; for a second run beside it give --no-resume."
        )
    return run


def asked_to_fit(recipe: RunConfig, size: str) -> str:
    """Compute a hash of a recipe as it was given and of the memory that its step is to fit."""
    content = [(n, str(value)) for n, value in flatten(recipe) if n not in _NO_DIFFERENCE]
    return hashlib.sha256(json.dumps([size, *sorted(content)]).encode()).hexdigest()


def layout_tag(layout: Layout) -> dict[str, str]:
    """Return the tag in which a run keeps the layout of its step."""
    return {_LAYOUT: json.dumps(asdict(layout))}


def layout_so_far(recipe: RunConfig, asked: str) -> Layout | None:
    """Return the layout of an unfinished run of the same command.

    A run keeps its layout, although the amount of free memory may have changed.

    Args:
        recipe: recipe with absolute paths.
        asked: hash that `asked_to_fit` returned.

    Returns:
        None if there is no such run, or none that could go on.
    """
    if not recipe.resume:
        return None
    _, found = _latest(recipe, ASKED, asked, output=recipe.output)
    if not found or found[0].info.status == "FINISHED":
        return None
    begun = newest_checkpoint(join(recipe.output, found[0].info.run_id)) is not None
    if not begun and found[0].info.status != "RUNNING":
        return None
    return Layout(**json.loads(found[0].data.tags[_LAYOUT]))


def _latest(config: Tracked, tag: str, value: str, *, output: str) -> tuple[str, Sequence[Any]]:
    """Return the store's URI and the last run whose tag has a value, as a list of at most one."""
    client, uri, experiment = open_store(config.experiment, output=output)
    found = client.search_runs(
        [experiment],
        filter_string=f"tags.`{tag}` = '{value}'",
        order_by=[f"tags.`{_NUMBER}` DESC", "attributes.start_time DESC"],
        max_results=1,
    )
    return uri, found
