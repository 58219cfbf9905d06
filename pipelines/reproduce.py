"""Run the paper's experiments as Ray tasks, and write one report.

On synthetic data, an hour on two CPU cores; or five minutes with --quick:

  python pipelines/reproduce.py
  python pipelines/reproduce.py --quick

The paper's own tables, with real videos and weights; options after "--" go to `train.py`:

  python pipelines/reproduce.py --only tal --tal.larger None --tal.recipes
  thumos_re2_swin_t_actionformer thumos_re2_swin_t_vsgn --tal.rewired re2_swin3d_t.safetensors --
  --data.annotations thumos14.json --data.videos thumos/ --model.weights swin3d_t.pth

The rewired weights are the plain ones after finetune_backbone.py. The report is
OUTPUT/reproduction/report.md; in MLflow it is a run, with a child run for each job. To continue
after a stop, give the same command again. Without Ray and MLflow:

  python -m pipelines.experiments paper
"""

import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import ray

from pipelines.config.command_line import told_shortly
from pipelines.core.cluster import init_ray
from pipelines.core.tracking import finishing, start_run
from pipelines.experiments.experiment import Job, Outcome
from pipelines.experiments.harness import Work, attempt, log_outcome, log_results
from pipelines.experiments.paper import Reproduction, carry_out, parse


def execute_on_ray(works: Sequence[Work]) -> Iterator[Outcome]:
    """Run jobs on the cluster: first in parallel, a core (and a GPU) each, then those alone."""
    together = [work for work in works if not work[1].alone]
    yield from _gathered(together, cpus=1)
    for work in works:
        if work[1].alone:
            yield from _gathered([work], cpus=0 if work[1].spreads else _cores())


def _gathered(works: Sequence[Work], *, cpus: float) -> Iterator[Outcome]:
    """Yield outcomes as jobs end."""
    running = {_started(*work, cpus=cpus): work for work in works}
    while running:
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        experiment, job = running.pop(done)
        try:
            yield ray.get(done)
        except ray.exceptions.RayError as problem:  # the job's process died
            error = f"{type(problem).__name__}: {problem}"
            yield Outcome(experiment=experiment, job=job, result=None, seconds=0.0, error=error)


def _started(experiment: str, job: Job, *, cpus: float) -> ray.ObjectRef:
    gpus = 1 if ray.cluster_resources().get("GPU") and not job.spreads else 0
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(_attempt)
    return task.remote(experiment, job, str(Path.cwd()))


def _attempt(experiment: str, job: Job, folder: str) -> Outcome:
    os.chdir(folder)  # paths are relative to the folder of the command
    return attempt(experiment, job)


def _cores() -> float:
    """Count the cores of the largest node: a job that measures time reserves the whole node."""
    return max(float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])


def main(asked: Reproduction) -> None:
    """Run the experiments.

    Raises:
        UserError: a job failed; the other jobs are done nevertheless.
    """
    init_ray(trains=any(job.spreads for one in asked.experiments.values() for job in one.jobs()))
    run = start_run(asked, output=Path(asked.output).absolute())
    with finishing(run):
        done = carry_out(asked, execute_on_ray, seen=partial(log_outcome, run))
        log_results(run, done)
        print(f"MLflow run {run.run_id} in {run.uri}", flush=True)
        done.refuse_failures()


if __name__ == "__main__":
    with told_shortly():
        main(parse(sys.argv[1:], __doc__ or ""))
