"""Fixture with results of experiments for their reports."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from pipelines.experiments.experiment import Experiment

Results = dict[str, Any]


@pytest.fixture(scope="session")
def results_of() -> Callable[[Experiment], Results]:
    """Run all jobs of an experiment; arguments and results are as if read back from a file."""

    def through_json(value: Any) -> Any:
        return json.loads(json.dumps(value))

    def results(experiment: Experiment) -> Results:
        return {
            job.name: through_json(job.work(**through_json(job.arguments)))
            for job in experiment.jobs()
        }

    return results
