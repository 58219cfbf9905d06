"""Experiments in MLflow: a run for each job, below that of all."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from pipelines.core.tracking import finishing, start_run
from pipelines.experiments.experiment import Job, Outcome, Section
from pipelines.experiments.harness import Chapter, circumstances, log_outcome, log_results, write
from pipelines.experiments.paper import Reproduction


@pytest.mark.slow
def test_jobs_and_results_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    job = Job(name="of 2", work=print, arguments={"of": 2})
    result = {"square": 4, "root, rounded": 1.4, "text": "no metric"}
    done = Outcome(experiment="squares", job=job, result=result, seconds=1.5)
    failed = replace(done, result=None, error="ArithmeticError: too much")
    section = Section(
        title="Squares",
        text="",
        tables={"All": [{"of": 2, "square": 4}]},
        figures={"squares": Figure()},
        metrics={"squares/of 2, that is 4": 4.0},
    )
    run = start_run(Reproduction(), output=tmp_path)
    with finishing(run):
        own = run.client.create_run(run.client.get_run(run.run_id).info.experiment_id).info.run_id
        for outcome in (done, failed, replace(done, result={"run_id": own})):
            log_outcome(run, outcome)
        facts = circumstances("a command", torch.device("cpu"))
        chapter = Chapter(name="squares", section=section, outcomes=[done])
        log_results(run, write([chapter], facts, tmp_path / "report"))
    parent = run.client.get_run(run.run_id)
    found = run.client.search_runs([parent.info.experiment_id])
    children = {one.info.run_id: one for one in found if one.info.run_id != run.run_id}
    assert len(children) == 3
    assert {one.data.tags["mlflow.parentRunId"] for one in children.values()} == {run.run_id}
    del children[own]  # the job made it, and ends it
    by_status = {one.info.status: one.data for one in children.values()}
    good, bad = by_status["FINISHED"], by_status["FAILED"]
    assert good.params == {"of": "2"}
    assert good.metrics == {"square": 4, "root_ rounded": 1.4, "seconds": 1.5}
    assert good.tags["kind"] == "squares"
    assert bad.tags["error"] == "ArithmeticError: too much"
    assert parent.data.metrics == {"squares/of 2_ that is 4": 4.0}
    artifacts = {file.path for file in run.client.list_artifacts(run.run_id)}
    assert {"report.md", "squares.json", "squares.png"} <= artifacts
