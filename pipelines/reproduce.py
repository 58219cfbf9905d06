"""Runs the paper's experiments, as Ray tasks, and writes one report.

On data that the project makes, an hour on two CPU cores, or five minutes:

  python pipelines/reproduce.py
  python pipelines/reproduce.py --quick

The paper's own tables, with real videos and weights; what follows "--" is for `train.py`:

  python pipelines/reproduce.py --only tal --tal.larger None --tal.recipes
  thumos_re2_swin_t_actionformer thumos_re2_swin_t_vsgn --tal.rewired re2_swin3d_t.safetensors --
  --data.annotations thumos14.json --data.videos thumos/ --model.weights swin3d_t.pth

The rewired weights are what finetune_backbone.py made of the plain ones. The report is
OUTPUT/reproduction/report.md; in MLflow it is a run, with one below it for each piece of work. The
same command goes on with what it has. Without Ray and MLflow:

  python -m pipelines.experiments
"""

import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import ray
from mlflow.entities import Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from pipelines.config.command_line import told_shortly
from pipelines.core.cluster import init_ray
from pipelines.core.metric_names import safe_path
from pipelines.core.tracking import Run, finishing, log_metrics, start_run
from pipelines.experiments.execution import Work, attempt
from pipelines.experiments.experiment import Job, Outcome
from pipelines.experiments.report import NUMBERS
from pipelines.experiments.running import Reproduced, reproduce
from pipelines.experiments.settings import Reproduction, parse
from re2tal.errors import UserError


def execute_on_ray(works: Sequence[Work]) -> Iterator[Outcome]:
    """Does jobs on the cluster, each on a core (and a GPU, if there are any), or by itself.

    Args:
        works: experiment and job.
    """
    together = [work for work in works if not work[1].alone]
    yield from _gathered(together, cpus=1)
    for work in works:
        if work[1].alone:
            yield from _gathered([work], cpus=0 if work[1].spreads else _cores())


def _gathered(works: Sequence[Work], *, cpus: float) -> Iterator[Outcome]:
    """Outcomes in the order in which they come."""
    running = {_started(*work, cpus=cpus): work for work in works}
    while running:
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        experiment, job = running.pop(done)
        try:
            yield ray.get(done)
        except ray.exceptions.RayError as problem:  # its process died
            error = f"{type(problem).__name__}: {problem}"
            yield Outcome(experiment=experiment, job=job, result=None, seconds=0.0, error=error)


def _started(experiment: str, job: Job, *, cpus: float) -> ray.ObjectRef:
    gpus = 1 if ray.cluster_resources().get("GPU") and not job.spreads else 0
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(_attempt)
    return task.remote(experiment, job, str(Path.cwd()))


def _attempt(experiment: str, job: Job, folder: str) -> Outcome:
    os.chdir(folder)  # paths are relative to where the command was given
    return attempt(experiment, job)


def _cores() -> float:
    """Of the largest node: what measures time has one to itself."""
    return max(float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])


def log_outcome(parent: Run, outcome: Outcome) -> None:
    """Makes an MLflow run of a piece of work, below that of all; one that it made itself is moved.

    Args:
        parent: the run of the experiments.
        outcome: how it ended.
    """
    client, job = parent.client, outcome.job
    result = outcome.result if isinstance(outcome.result, dict) else {}
    if "run_id" in result:
        client.set_tag(result["run_id"], MLFLOW_PARENT_RUN_ID, parent.run_id)
        return
    experiment = client.get_run(parent.run_id).info.experiment_id
    run = Run(uri=parent.uri, run_id=client.create_run(experiment).info.run_id)
    params = [Param(name, str(value)) for name, value in job.arguments.items()]
    tags = {
        MLFLOW_PARENT_RUN_ID: parent.run_id,
        MLFLOW_RUN_NAME: f"{outcome.experiment}: {job.name}",
        "kind": outcome.experiment,
    }
    client.log_batch(run.run_id, params=params, tags=[RunTag(*tag) for tag in tags.items()])
    numbers = {safe_path(name): v for name, v in result.items() if isinstance(v, int | float)}
    log_metrics(run, numbers | {"seconds": outcome.seconds}, step=0)
    client.log_dict(run.run_id, {"result": outcome.result}, "result.json")
    if outcome.error:
        client.set_tag(run.run_id, "error", outcome.error[:5000])
    client.set_terminated(run.run_id, "FAILED" if outcome.error else "FINISHED")


def log_report(run: Run, found: Reproduced) -> None:
    """Puts report, pictures and the numbers that claims rest on into MLflow.

    Args:
        run: of the experiments.
        found: what came out.
    """
    client = run.client
    for file in (found.report, found.report.with_name(NUMBERS)):
        client.log_artifact(run.run_id, str(file))
    for chapter in found.chapters:
        if chapter.section is None:
            continue
        for name in chapter.section.figures:
            client.log_artifact(run.run_id, str(found.report.with_name(f"{name}.png")))
        metrics = {safe_path(name): value for name, value in chapter.section.metrics.items()}
        log_metrics(run, metrics, step=0)


def main(asked: Reproduction) -> None:
    """Does the experiments.

    Args:
        asked: which, and how large.

    Raises:
        UserError: if a piece of work failed; the others are done all the same.
    """
    init_ray(trains=any(job.spreads for one in asked.experiments for job in one.jobs()))
    run = start_run(asked, output=Path(asked.output).absolute())
    with finishing(run):
        found = reproduce(asked, execute_on_ray, seen=partial(log_outcome, run))
        log_report(run, found)
        print(f"MLflow run {run.run_id} in {run.uri}", flush=True)
        if found.failures:
            raise UserError(
                f"{found.failures} pieces of work failed, as listed above; the same command tries "
                "them again."
            )


if __name__ == "__main__":
    with told_shortly():
        main(parse(sys.argv[1:], __doc__ or ""))
