"""Experiments as runs in MLflow."""

from mlflow.entities import Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from pipelines.core.metric_names import safe_path
from pipelines.core.tracking import Run, log_metrics
from pipelines.experiments.experiment import Outcome
from pipelines.experiments.harness import Done


def log_outcome(parent: Run, outcome: Outcome) -> None:
    """Make a job's MLflow run below the parent's; a run that the job itself made is moved there."""
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


def log_results(run: Run, done: Done) -> None:
    """Log report, pictures and the numbers behind the claims in the run of the experiments."""
    for file in done.files:
        run.client.log_artifact(run.run_id, str(file))
    for chapter in done.chapters:
        if chapter.section is not None:
            metrics = chapter.section.metrics
            log_metrics(run, {safe_path(name): v for name, v in metrics.items()}, step=0)
